"""The tab that compares two pipelines blindly."""

import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from ..training.checkpointing import write_json, write_text
from .abilities import NO_GUIDANCE, LoadedPipeline, default_scheme
from .comparison import LEFT, RANDOM_CLASS, RIGHT, TIE, Comparison, common_classes, common_schemes, common_solvers
from .generation import sample
from .widgets import QUEUED, Abilities, RunControls, Visitors, as_files, code, literal, picture, with_messages


# Gradio puts the progress of a call in the place of this default
PROGRESS = gr.Progress()
HELP = """
Both images have the same class and seed. Which pipeline is on which side is drawn from the seed, and told after your
vote. The images of the first pair have the seed that you choose, those of the next pair the next seed, and so on.
"""
VOTE_WORDS = {LEFT: "the left image", RIGHT: "the right image", TIE: "neither"}


def tally_table(comparison: Comparison) -> str:
    """
    The votes so far.

    Args:
        comparison ([`Comparison`]): The comparison.

    Returns:
        `str`: A Markdown table.
    """
    first, second = map(code, comparison.labels)
    wins, ties, losses = comparison.tally.values()
    return (
        f"| | wins | ties | losses |\n| --- | --- | --- | --- |\n| {first} | {wins} | {ties} | {losses} |\n"
        f"| {second} | {losses} | {ties} | {wins} |"
    )


def reveal(comparison: Comparison) -> str:
    """
    What is told after a vote.

    Args:
        comparison ([`Comparison`]): The comparison, whose last pair has its vote.

    Returns:
        `str`: A sentence in Markdown.
    """
    pair, (first, second) = comparison.pairs[-1], map(code, comparison.labels)
    left, right = (first, second) if pair.first_is_left else (second, first)
    return f"You preferred **{VOTE_WORDS[pair.vote]}**. Left was {left}, right was {right}."


def write_results(comparison: Comparison) -> tuple[str, str]:
    """
    The files to download.

    Args:
        comparison ([`Comparison`]): The comparison.

    Returns:
        `tuple[str, str]`: Paths of a JSON and a CSV file, in a new temporary folder.
    """
    folder = Path(tempfile.mkdtemp(dir=get_upload_folder()))
    paths = folder / "comparison.json", folder / "comparison.csv"
    write_json(paths[0], comparison.to_dict())
    write_text(paths[1], comparison.to_csv())
    return str(paths[0]), str(paths[1])


def compare_tab(first: LoadedPipeline, second: LoadedPipeline, visitors: Visitors) -> None:
    """
    Lay out the tab.

    Args:
        first ([`LoadedPipeline`]): One pipeline, whose wins are counted.
        second ([`LoadedPipeline`]): The other, of the same classes.
        visitors ([`Visitors`]): Those of the page.
    """
    pipes = (first.pipe, second.pipe)
    classes, schemes = common_classes(*pipes), common_schemes(*pipes)
    scheme = default_scheme(first.pipe)
    abilities = Abilities(
        classes={RANDOM_CLASS: "another one each time"} | classes,
        schemes=schemes,
        solvers=common_solvers(*pipes),
        scheme=scheme if scheme in schemes else NO_GUIDANCE,
        defaults=first.pipe,
    )
    start = Comparison(names=(first.name, second.name), revisions=(first.revision, second.revision))
    comparison = gr.State(start)
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            controls = RunControls(abilities)
        with gr.Column(scale=2, min_width=300):
            gr.Markdown(HELP)
            ask = gr.Button("Show a pair", variant="primary", elem_id="next-pair")
            status = gr.Markdown("No pair yet.", elem_id="compare-status")
            with gr.Row():
                left = picture("Left", height=320, elem_id="left")
                right = picture("Right", height=320, elem_id="right")
            with gr.Row():
                votes = {
                    vote: gr.Button(words, interactive=False, elem_id=f"vote-{vote}", min_width=100)
                    for vote, words in ((LEFT, "Left is better"), (TIE, "Tie"), (RIGHT, "Right is better"))
                }
            tally = gr.Markdown(tally_table(start), elem_id="tally")
            with gr.Row():
                as_json = gr.DownloadButton("Download JSON", interactive=False, elem_id="as-json")
                as_csv = gr.DownloadButton("Download CSV", interactive=False, elem_id="as-csv")

    @with_messages
    def show_pair(
        comparison: Comparison, request: gr.Request, progress: gr.Progress = PROGRESS, *values: Any
    ) -> tuple:
        comparison = comparison.next_pair(controls.settings(*values), classes)
        pair = comparison.pairs[-1]
        images = []
        for part, pipe in enumerate(pipes):

            def report(done: int, total: int, part: int = part) -> None:
                visitors.check(request)
                progress((part * total + done, 2 * total), unit="steps")

            images += sample(pipe, pair.settings, report)
        left, right = images if pair.first_is_left else images[::-1]
        sides = as_files({"left": left, "right": right})
        name, seed = literal(pair.class_name), pair.settings.seed
        text = f"Pair {pair.number + 1}: class {name}, seed {seed}. **Which one is better?**"
        # the next pair comes after a vote: no pair can be exchanged for a better one
        return comparison, text, *sides, *[gr.update(interactive=True)] * len(votes), gr.update(interactive=False)

    def voter(vote: str) -> Any:
        @with_messages
        def count_vote(comparison: Comparison) -> tuple:
            comparison = comparison.vote(vote)
            files = [gr.update(value=path, interactive=True) for path in write_results(comparison)]
            disabled = [gr.update(interactive=False)] * len(votes)
            return (
                comparison,
                reveal(comparison),
                tally_table(comparison),
                *files,
                *disabled,
                gr.update(value="Next pair", interactive=True),
            )

        return count_vote

    buttons = list(votes.values())
    ask.click(show_pair, [comparison, *controls.inputs], [comparison, status, left, right, *buttons, ask], **QUEUED)
    outputs = [comparison, status, tally, as_json, as_csv, *buttons, ask]
    for vote, button in votes.items():
        button.click(
            voter(vote), comparison, outputs, show_progress="hidden", api_visibility="private", concurrency_limit=None
        )
