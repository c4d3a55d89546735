"""Results of an evaluation on the Hub, in the card of the model that they are of.

They become entries of the `model-index` in the card's metadata, which the Hub shows beside the model: each number with
its protocol as the metric's arguments, and a link to the report, which lies in the repository. (Files of
`.eval_results` are for benchmarks that the Hub hosts, with tasks of their own; the image sets compared with here are
none.)
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..training import hub, hub_worker
from ..training.hub_files import check_access
from ..training.model_card import is_on_hub, public_name
from .protocol import UNKNOWN


FOLDER = "evaluation"
KEY_LENGTH = 12


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """
    What results are results of.

    Args:
        task_type (`str`): Task by its name on the Hub.
        task_name (`str`): Task in words.
        dataset_name (`str`): Images that were compared with, or reconstructed.
        dataset_id (`str`, *optional*): Data set, as it was given; not stated if it is a folder or a file.
        dataset_config (`str`, *optional*): Its configuration.
        dataset_split (`str`, *optional*): Its split.
        dataset_revision (`str`, *optional*): Its branch, tag or commit.
    """

    task_type: str
    task_name: str
    dataset_name: str
    dataset_id: str | None = None
    dataset_config: str | None = None
    dataset_split: str | None = None
    dataset_revision: str | None = None

    def entries(
        self, results: Mapping[str, float], labels: Mapping[str, str], protocol: Mapping[str, Any], source_url: str
    ) -> list[Any]:
        """
        The results for the metadata of a card.

        Args:
            results (`Mapping[str, float]`): Numbers by name. Deviations, whose names end in `_std`, are left to the
                report.
            labels (`Mapping[str, str]`): Their names in words.
            protocol (`Mapping[str, Any]`): Conditions; those that are not stated are left out.
            source_url (`str`): Address of the report.

        Returns:
            `list[EvalResult]`: One for each number.
        """
        from huggingface_hub import EvalResult

        on_hub = self.dataset_id is not None and is_on_hub(self.dataset_id)
        stated = {name: value for name, value in protocol.items() if value not in (None, UNKNOWN, "none")}
        return [
            EvalResult(
                task_type=self.task_type,
                task_name=self.task_name,
                dataset_type=self.dataset_id if on_hub else "local",
                dataset_name=public_name(self.dataset_id) if self.dataset_id else self.dataset_name,
                dataset_config=self.dataset_config,
                dataset_split=self.dataset_split,
                dataset_revision=self.dataset_revision,
                metric_type=name,
                metric_name=labels[name],
                metric_value=value,
                metric_args=stated,
                source_name="Report with its protocol",
                source_url=source_url,
            )
            for name, value in results.items()
            if not name.endswith("_std")
        ]


class ResultsUpload:
    """
    Puts reports into the repository of a model, and results into its card.

    Only one process of a command may make one of these.

    Args:
        repo_id (`str`): Repository of the model or pipeline, with or without a namespace; it must exist.

    Attributes:
        repo_id: With its namespace.

    Raises:
        ValueError: If there is no such repository, or this token may not write there. When the Hub cannot be reached
            there is a warning only.
    """

    def __init__(self, repo_id: str):
        self.repo_id = repo_id
        self.repo_id = check_access("push_to_hub", repo_id, self._ask)

    def push(
        self,
        files: Sequence[Path],
        protocol: Any,
        benchmark: Benchmark | None = None,
        results: Mapping[str, float] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> str:
        """
        Upload, and try again when the Hub or the network fails. Results under the same protocol replace those that are
        there, others are added to them.

        Args:
            files (`Sequence[Path]`): The report first. Their names get a key of the protocol.
            protocol (`Any`): Conditions in plain values: a mapping of one set of results.
            benchmark ([`Benchmark`], *optional*): What `results` are results of.
            results (`Mapping[str, float]`, *optional*): Numbers for the card; without them there are only files.
            labels (`Mapping[str, str]`, *optional*): Their names in words.

        Returns:
            `str`: Address of the report on the Hub.

        Raises:
            OSError: If it fails; the files are as they were.
        """
        key = hashlib.blake2b(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]
        names = {f"{FOLDER}/{path.stem}-{key}{path.suffix}": path for path in files}
        result = hub_worker.attempt(lambda: self._push(names, protocol, benchmark, results, labels), hub.RETRY_WAITS)
        if "error" in result:
            raise OSError(
                f"The results are in {files[0].parent}, but not all on the Hub in {self.repo_id}: {result['error']}\n"
                "Give the same command again to upload them: nothing is measured twice."
            )
        return result["url"]

    def _ask(self) -> dict[str, Any]:
        from huggingface_hub import HfApi

        api = HfApi()
        repo_id = self.repo_id if "/" in self.repo_id else f"{api.whoami()['name']}/{self.repo_id}"
        api.auth_check(repo_id, write=True)
        return {"repo_id": repo_id}

    def _push(
        self,
        names: Mapping[str, Path],
        protocol: Any,
        benchmark: Benchmark | None,
        results: Mapping[str, float] | None,
        labels: Mapping[str, str] | None,
    ) -> dict[str, Any]:
        from huggingface_hub import CommitOperationAdd, HfApi, metadata_update
        from huggingface_hub.repocard_data import eval_results_to_model_index

        api = HfApi()
        repo_id = self._ask()["repo_id"]
        message = f"Evaluation: {', '.join(results) if results else next(iter(names))}"
        additions = [CommitOperationAdd(name, str(path)) for name, path in names.items()]
        api.create_commit(repo_id, additions, commit_message=message)
        url = f"{api.endpoint}/{repo_id}/blob/main/{next(iter(names))}"
        if results:
            entries = benchmark.entries(results, labels, protocol, url)
            index = eval_results_to_model_index(repo_id.split("/")[-1], entries)
            # a card that changes in between is refused, and read again by the next attempt
            commit = api.model_info(repo_id).sha
            metadata_update(
                repo_id, {"model-index": index}, overwrite=True, commit_message=message, parent_commit=commit
            )
        return {"url": url}
