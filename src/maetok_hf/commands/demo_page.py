"""`maetok-demo`: a page in the browser to try pipelines on."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from diffusers.utils.logging import disable_progress_bar

from ..page.abilities import LoadedPipeline
from ..page.comparison import check_comparable
from ..page.server import LOCAL_HOSTS, address_of, is_local, make_app, open_port, private_folder, serve
from ..sampling import load_pipeline
from ..sampling.options import SamplingOptions
from .command_line import parse_words


PROG = "maetok-demo"
DESCRIPTION = """\
A page in the browser to try pipelines on: generate images of a class and watch the denoising, see what becomes of an
image of yours and which token is what, interpolate between images or classes, and compare two pipelines blindly.
"""
EXAMPLES = f"""\
  {PROG} --pipeline outputs/demo/pipeline
  {PROG} --pipeline runs/generator user/repository --dtype bfloat16
  {PROG} --pipeline runs/generator --compare runs/generator-gft
  {PROG} --pipeline user/repository --revision v2 --compare user/repository --compare_revision v1
"""
NOTES = """
The page is at the address that is printed; Ctrl-C ends it. It is served to this machine only, until --host says
otherwise: there are no passwords. From elsewhere, forward the port: ssh -L 7860:127.0.0.1:7860 MACHINE

exit codes: 0 after Ctrl-C, 1 if a pipeline cannot be loaded or the port be taken, 2 for a wrong command line.
"""


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """
    Options of `maetok-demo`.

    Args:
        pipeline (`list[str]`):
            Pipelines to try, folders or Hub repositories; with several, the page has a choice.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repositories of `pipeline`.
        compare (`str`, *optional*):
            Pipeline that the first one is compared with, blindly; without it the page has no comparison.
        compare_revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository of `compare`.
        dtype (`str`, *optional*, defaults to `"float32"`):
            `"float32"`, `"bfloat16"` or `"float16"`, in which the models compute.
        device (`str`, *optional*, defaults to `"auto"`):
            `"auto"` (CUDA if there is any), `"cpu"` or `"cuda"`.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen on. With 0.0.0.0, everyone who reaches this machine can use the page.
        port (`int`, *optional*, defaults to 7860):
            Port to listen on, 0 for any free one.
    """

    pipeline: list[str]
    revision: str | None = None
    compare: str | None = None
    compare_revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    host: str = "127.0.0.1"
    port: int = 7860

    def __post_init__(self):
        if not self.pipeline:
            raise ValueError("`pipeline` must name a folder or a Hub repository, got none.")
        if len(set(self.pipeline)) < len(self.pipeline):
            raise ValueError(f"`pipeline` names a pipeline twice: {' '.join(self.pipeline)}.")
        if self.compare_revision is not None and self.compare is None:
            raise ValueError(f"`compare_revision` = {self.compare_revision!r} has no effect without `compare`.")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"`port` must be from 0 to 65535, got {self.port}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("`device` is 'cuda', but torch finds no CUDA device: choose 'cpu' or 'auto'.")


def parse_options(words: Sequence[str] | None = None) -> PageOptions:
    """
    The command line: one flag for every field of [`PageOptions`].

    Args:
        words (`Sequence[str]`, *optional*): Its words; by default those of this process.

    Returns:
        [`PageOptions`]: What is asked for.

    Raises:
        SystemExit: With a message, if a flag or its value is wrong.
    """
    return parse_words(PROG, DESCRIPTION, EXAMPLES, PageOptions, words, notes=NOTES)


def load(name: str, revision: str | None, dtype: str, device: torch.device) -> LoadedPipeline:
    """
    A pipeline for the page.

    Args:
        name (`str`): Folder or Hub repository.
        revision (`str`, *optional*): Branch, tag or commit of the Hub repository.
        dtype (`str`): In which its models compute.
        device (`torch.device`): Where they shall be.

    Returns:
        [`LoadedPipeline`]: The pipeline.

    Raises:
        ValueError: If it is not there, or is no pipeline that can sample; the message says what to do.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ValueError(
            f"the folder {name} has no model_index.json, so it holds no pipeline: name the folder that "
            "`save_pretrained` of a pipeline wrote."
        )
    looks_local = folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1
    if not folder.is_dir() and looks_local:
        raise ValueError(f"there is no folder {name}, and that is no name of a Hub repository (user/name).")
    options = SamplingOptions(pretrained_model_name_or_path=name, revision=revision, dtype=dtype)
    try:
        pipe = load_pipeline(options, device)
        # what a call would refuse shall be said now
        pipe.check_inputs([], (0.0, 1.0), 1, 1, None, None, "pil", None, [])
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        where = "" if folder.is_dir() else ", neither as a folder nor as a Hub repository"
        raise ValueError(f"cannot load the pipeline {name}{where}: {error}") from error
    return LoadedPipeline(pipe=pipe, name=name, revision=revision)


def load_all(options: PageOptions) -> tuple[list[LoadedPipeline], LoadedPipeline | None]:
    """
    All pipelines of the page.

    Args:
        options ([`PageOptions`]): What is asked for.

    Returns:
        `tuple[list[LoadedPipeline], LoadedPipeline | None]`: Those to try, and the one to compare the first one with.

    Raises:
        ValueError: If one cannot be loaded, or the two to be compared have different classes.
    """
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    loaded = [load(name, options.revision, options.dtype, device) for name in options.pipeline]
    if options.compare is None:
        return loaded, None
    again = [one for one in loaded if (one.name, one.revision) == (options.compare, options.compare_revision)]
    other = again[0] if again else load(options.compare, options.compare_revision, options.dtype, device)
    check_comparable(loaded[0].pipe, other.pipe)
    return loaded, other


def quiet_others() -> None:
    """Switch off what Gradio reports to its makers, and the chatter of libraries; warnings of ours and of pipelines
    stay."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    logging.basicConfig(format="%(message)s")
    disable_progress_bar()  # of loading components
    for name in ("httpx", "httpcore", "asyncio", "multipart"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("gradio", "starlette", "fastapi", "uvicorn", "websockets"):
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=module)


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run the command.

    Args:
        argv (`Sequence[str]`, *optional*): Words of the command line; by default those of this process.

    Raises:
        SystemExit: With 1 and a message, if the page cannot be served.
    """
    options = parse_options(argv)
    quiet_others()
    try:
        missing = [name for name in ("gradio", "matplotlib") if find_spec(name) is None]
        if missing:
            raise ValueError(f"{' and '.join(missing)} is not installed: pip install 'maetok_hf[page]'.")
        sock = open_port(options.host, options.port)
        print("Loading the pipelines ...", flush=True)
        pipelines, other = load_all(options)
    except ValueError as error:
        sys.exit(f"{PROG}: error: {error}")
    except KeyboardInterrupt:
        return
    from ..page.layout import build_page, page_css

    with private_folder():
        hosts = (*LOCAL_HOSTS, options.host) if is_local(sock) else None
        app = make_app(build_page(pipelines, other), page_css(pipelines), hosts)
        sock.listen()  # a browser that comes at once waits until the server has started
        print(f"The page is at {address_of(sock)} (Ctrl-C ends it).", flush=True)
        if not is_local(sock):
            print("Everyone who reaches this machine can use it: there are no passwords.", flush=True)
        serve(app, sock)
    print("Ended.", flush=True)


if __name__ == "__main__":
    main()
