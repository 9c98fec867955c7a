"""
The command `trl-ext`: what losses there are, TRL scripts with them, and a demonstration.

Heavy imports stay inside the commands: `trl-ext --help` answers at once.
"""

import argparse
import dataclasses
import importlib.util
import os
import runpy
import sys
import traceback
from pathlib import Path

from trl_ext.upstream import explained
from trl_ext.version import __version__


# Set to see where an error of ours came from
TRACEBACK_VARIABLE = "TRL_EXT_TRACEBACK"


def main(argv: list[str] | None = None) -> int:
    """Run `trl-ext`; returns the exit status. An error in what the user gave ends in one message, not a traceback."""
    args = _parser().parse_args(argv)
    try:
        return args.function(args)
    except (ValueError, TypeError, ImportError) as error:
        if os.environ.get(TRACEBACK_VARIABLE) or not _is_about_input(error):
            raise
        print(f"trl-ext: error: {explained(error) or error}", file=sys.stderr)
        print(f"(set {TRACEBACK_VARIABLE}=1 for the traceback)", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-ext", description="Preference losses for TRL. https://pypi.org/project/trl-ext/"
    )
    parser.add_argument("--version", action="version", version=f"trl-ext {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    losses = commands.add_parser("losses", help="list the losses, or show one in full")
    losses.add_argument("name", nargs="?", metavar="NAME", help="a loss, by name or alias")
    losses.set_defaults(function=_losses)

    run = commands.add_parser(
        "run",
        help="run a TRL script, or TRL's own `dpo` command, with the losses of this package",
        description="Run an unmodified script with trl.DPOConfig and trl.DPOTrainer replaced by those of trl_ext. On "
        "several devices: accelerate launch -m trl_ext run SCRIPT ...",
    )
    run.add_argument(
        "script",
        metavar="SCRIPT",
        help="path of a Python script, or `dpo` for TRL's own command, whose "
        "--dataset_name may also be a JSON, JSON Lines, CSV or Parquet file",
    )
    run.add_argument("script_args", nargs=argparse.REMAINDER, metavar="ARGS", help="its arguments")
    run.set_defaults(function=_run)

    iterate = commands.add_parser(
        "iterate",
        help="rounds of sample, score, pair, train",
        description="Run the rounds that a YAML file describes (see examples/rounds). A run that was killed goes on where it "
        "was. Settings can be given here too: --rounds 2 --training.learning_rate 1e-6. On several devices: accelerate "
        "launch -m trl_ext iterate CONFIG.yaml",
    )
    iterate.add_argument("config", metavar="CONFIG.yaml", help="settings of the rounds")
    iterate.add_argument(
        "overrides", nargs=argparse.REMAINDER, metavar="--NAME VALUE", help="settings that replace them"
    )
    iterate.set_defaults(function=_iterate)

    from trl_ext import compare, demo, inspect_data

    inspect_parser = commands.add_parser(
        "inspect", help="what a preference dataset holds, and which losses to try on it"
    )
    inspect_data.add_arguments(inspect_parser)
    inspect_parser.set_defaults(function=inspect_data.run)

    compare_parser = commands.add_parser("compare", help="trainings side by side, seeds as one: a table and plots")
    compare.add_arguments(compare_parser)
    compare_parser.set_defaults(function=compare.run)

    demo_parser = commands.add_parser("demo", help="train DPO and our losses in a small world, nothing to download")
    demo.add_arguments(demo_parser)
    demo_parser.set_defaults(function=demo.run)
    return parser


def _is_about_input(error: BaseException) -> bool:
    """Whether an error was raised on purpose about what the user gave: by our code, or by TRL's command line."""
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    # An import that fails does so in Python's own code
    innermost = Path([name for name in frames if not name.startswith("<frozen importlib")][-1])
    trl = importlib.util.find_spec("trl")
    theirs = [Path(trl.origin).parent / "scripts"] if trl is not None and trl.origin else []
    return any(folder in innermost.parents for folder in (Path(__file__).parent, *theirs))


def _losses(args: argparse.Namespace) -> int:
    if args.name is not None:
        from trl_ext.sources import refuse_unknown_losses

        refuse_unknown_losses([args.name], trl=False)
    from rich.console import Console

    from trl_ext.losses import plugin_errors

    console = Console()
    if args.name is not None:
        # Formulas hold square brackets and long lines: no markup, no wrapping
        console.print(_one_loss(args.name), markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(_all_losses())
        console.print("[dim]trl-ext losses NAME shows one in full. TRL's own loss types work as they do in TRL.[/dim]")
        for reason in plugin_errors():
            console.print(reason, markup=False, highlight=False, soft_wrap=True)
    return 0


def _all_losses():
    """A table of all losses; plug-ins that cannot be loaded are left out."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from trl_ext.losses import list_aliases, list_losses, loss_class, plugin_errors

    plugin_errors()  # loads the plug-ins, which may register further names
    # So narrow that no name is broken in a terminal of 80 characters
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("loss_type", "hyper-parameters", "columns", "paper"):
        table.add_column(heading, overflow="fold")
    for name in list_losses():
        try:
            cls = loss_class(name)
        except ValueError:
            continue
        aliases = "".join(f"\n[dim]{alias}[/dim]" for alias in list_aliases(name))
        hyperparameters = [
            escape(f"{field.name}={_default(field)}") for field in dataclasses.fields(cls) if field.init
        ]
        columns = [*cls.columns, *(f"({column})" for column in _optional(cls))]
        table.add_row(
            f"[bold]{name}[/bold]{aliases}",
            "\n".join(hyperparameters),
            "\n".join(columns),
            cls.paper.replace(", ", "\n"),
        )
        table.add_section()
    table.caption = "aliases stand below a name; columns in brackets are optional"
    return table


def _one_loss(name: str) -> str:
    """All that is known of a loss: formula, hyper-parameters, columns, paper."""
    import inspect

    from trl_ext.losses import list_aliases, loss_class, resolve_name

    name = resolve_name(name)
    cls = loss_class(name)
    papers = [f"https://huggingface.co/papers/{paper.strip()}" for paper in cls.paper.split(",") if paper]
    hyperparameters = [f"{field.name}={_default(field)}" for field in dataclasses.fields(cls) if field.init]
    none = "depend on the hyper-parameters" if isinstance(cls.optional_columns, property) else "none"
    lines = [
        f"{name}  (aliases: {', '.join(list_aliases(name)) or 'none'})",
        *([f"{cls.title}  {' '.join(papers)}"] if papers else []),
        "",
        # Our files hold one loss each and say its formula first; a user's class may stand anywhere
        inspect.getdoc(sys.modules[cls.__module__]) if cls.__module__.startswith("trl_ext.losses.") else "",
        "",
        inspect.getdoc(cls) or "",
        "",
        *([f"How sure: {cls.evidence}"] if cls.evidence else []),
        f"Hyper-parameters: {', '.join(hyperparameters) or 'none'}",
        f"Columns: {', '.join(cls.columns) or 'none'}",
        f"Optional columns: {', '.join(_optional(cls)) or none}",
        *_reads_and_state(name),
        f"Takes groups of completions: {_groups(cls)}",
        *(["Takes lists of scores, one number per reward model: yes"] if cls.takes_lists is True else []),
    ]
    return "\n".join(lines)


def _groups(cls: type) -> str:
    if not cls.takes_groups:
        return "no"
    return "yes" if cls.takes_pairs else "yes, and no pairs"


def _reads_and_state(name: str) -> list[str]:
    """What a loss asks for beside its columns, with the defaults of its hyper-parameters where that depends on them."""
    from trl_ext.losses import Loss, get_loss, loss_class

    cls = loss_class(name)
    try:
        loss = get_loss(name)
    except ValueError:  # a hyper-parameter without a default
        loss = None
    depends = "depends on the hyper-parameters"
    fixed = isinstance(cls.reads, frozenset)
    stated = cls.reads if fixed else getattr(loss, "reads", None)
    words = {
        "ref_logps": "reference",
        "token_logps": "token log-probs",
        "behaviour_logps": "behaviour log-probs",
        "teachers": "teachers",
    }
    reads, state = depends, "none"
    if stated is not None:
        reads = ", ".join(["policy", *(word for name, word in words.items() if name in stated)])
        reads += "" if fixed else f" ({depends})"
    if cls.init_state is not Loss.init_state:
        state = depends if loss is None else ", ".join(loss.init_state()) or "none"
    return [f"Reads: {reads}", f"State: {state}"]


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return "required" if field.default_factory is dataclasses.MISSING else repr(field.default_factory())


def _optional(cls: type) -> tuple[str, ...]:
    """Optional columns of a class; those that depend on hyper-parameters are left out."""
    return cls.optional_columns if isinstance(cls.optional_columns, tuple) else ()


def _iterate(args: argparse.Namespace) -> int:
    from trl_ext.rounds.settings import check_early, given_overrides

    overrides = given_overrides(args.overrides)
    check_early(args.config, overrides)
    from rich.console import Console

    from trl_ext.rounds import IterativeDPO, RoundsConfig
    from trl_ext.rounds.report import table

    sys.path.insert(0, os.getcwd())  # reward functions and judges of the user's own
    config = RoundsConfig.from_yaml(args.config, overrides)
    metrics = IterativeDPO(config).run()
    Console().print(table(metrics))
    return 0


def _run(args: argparse.Namespace) -> int:
    path = Path(args.script)
    if not path.is_file() and args.script != "dpo":
        raise ValueError(
            f"There is no script {args.script!r}. Give the path of a Python file, or `dpo` for TRL's command."
        )
    if path.is_file():
        from trl_ext.trainers.patch import patch_trl

        patch_trl()
        sys.argv = [args.script, *args.script_args]
        sys.path.insert(0, str(path.resolve().parent))  # as Python would have it
        runpy.run_path(args.script, run_name="__main__")
        return 0
    from trl_ext.run_dpo import run

    sys.argv = ["trl-ext run dpo", *args.script_args]
    run(args.script_args)
    return 0
