"""`maetok-eval`: evaluations by name."""

import sys
from collections.abc import Sequence
from importlib.metadata import version

from . import evaluate_generation, evaluate_tokenizer, sweep_guidance
from .command_line import EXIT_CODES


COMMANDS = {
    "tokenizer": (evaluate_tokenizer.main, "rFID, PSNR, SSIM and LPIPS of a tokenizer's reconstructions"),
    "generation": (evaluate_generation.main, "FID, sFID, Inception Score, KID, precision and recall of images"),
    "guidance": (sweep_guidance.main, "such scores over scales and intervals of guidance"),
}
HELP = """usage: maetok-eval {{{names}}} ...

{lines}

examples:
{examples}
`maetok-eval NAME --help` lists the options of each. On several processes:

    accelerate launch --num_processes 8 --mixed_precision no -m maetok_hf.commands.evaluate NAME ...
{exit_codes}"""


def usage() -> str:
    """
    What `maetok-eval --help` prints.

    Returns:
        `str`: Lines of text.
    """
    width = max(map(len, COMMANDS))
    lines = [f"    {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    modules = (evaluate_tokenizer, evaluate_generation, sweep_guidance)
    examples = "".join(module.EXAMPLES for module in modules)
    return HELP.format(names=",".join(COMMANDS), lines="\n".join(lines), examples=examples, exit_codes=EXIT_CODES)


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run an evaluation.

    Args:
        argv (`Sequence[str]`, *optional*): Name of the evaluation and its flags; by default those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["--help"], ["-h"]):
        print(usage())
    elif words[:1] == ["--version"]:
        print(version("maetok_hf"))
    elif words and words[0] in COMMANDS:
        COMMANDS[words[0]][0](words[1:])
    else:
        print(usage(), file=sys.stderr)
        given = f"got {words[0]!r}" if words else "got nothing"
        print(f"maetok-eval: error: name one of {', '.join(COMMANDS)}, {given}.", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
