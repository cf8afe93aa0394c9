"""`longact completion`: a script with which a shell completes commands and options."""

from longact_kernels.commands.console import Parser

SHELLS = ("bash", "zsh", "tcsh")


def parser() -> Parser:
    parser = Parser(
        "longact completion",
        description="Prints a script that completes commands and options. For bash: "
        "longact completion bash > ~/.local/share/bash-completion/completions/longact",
    )
    parser.add_argument("shell", choices=SHELLS, help=f"one of {', '.join(SHELLS)}")
    return parser


def main(argv: list[str]) -> int:
    """Runs `longact completion`; returns the exit status, 0.

    Raises:
        Refusal: bad input.
    """
    shell = parser().parse_args(argv).shell
    import shtab

    from longact_kernels.commands.parsers import root_parser

    root = root_parser(complete=True)
    for command in root._subparsers._group_actions[0].choices.values():  # type: ignore[union-attr]
        for action in command._actions:
            if action.choices is None and action.nargs != 0 and action.type in (None, str):
                # A model, a configuration, a data set, a folder for results.
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(root, shell))
    return 0
