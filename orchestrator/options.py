"""The options that verbs share, alone and in groups (see `grouped.py`).

Imports nothing heavy: help is made from this.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from analysis.errors import InputError, PlainWarning
from analysis.numerals import read_number
from analysis.visible import visible

if TYPE_CHECKING:
    from rich.console import Console

    from analysis.diagnosis import Rate
    from analysis.fitting import Method
    from analysis.study import Study
    from orchestrator.reading import Convention, Reading
    from orchestrator.source import Source
    from orchestrator.spec import SweepSpec

READING, FITTING, PRICE = "What is read", "How it is fitted", "What it costs"
CLUSTER = "The cluster, in place of the file's"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
ProjectPath = Annotated[
    str, typer.Argument(metavar="PROJECT", help="A project: a directory, s3://... or gs://...")
]
ProjectOption = Annotated[
    str | None,
    typer.Option(
        "--project",
        metavar="DIR|URI",
        help="Where observations go: a directory, s3://BUCKET/NAME or gs://BUCKET/NAME, "
        "which all nodes of a cluster must share. Default, but for submit: the project that the "
        "sweep file lies in, else projects/NAME.",
    ),
]
MeasuredProject = Annotated[
    str | None,
    typer.Option(
        "--project",
        metavar="DIR|URI",
        help="Whose measured times are used, where it has any. Default: the project that the sweep "
        "file lies in, else projects/NAME.",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="auto|HOST:PORT",
        help="A running Ray cluster, of which this machine is a node; auto: what RAY_ADDRESS says, "
        "else the one of which you run a node here. Default: this machine.",
    ),
]
TrackingUri = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri",
        metavar="URI",
        help="MLflow's store. Default: MLFLOW_TRACKING_URI, else one in a local project.",
    ),
]
_PARAMS_HELP = "How N counts: non_embedding, matmul or total; given, of others' data."
Params = Annotated[
    str | None,
    typer.Option("--params", "--params-as", help=_PARAMS_HELP, rich_help_panel=FITTING),
]
ParamsAs = Annotated[
    str | None, typer.Option("--params-as", help=_PARAMS_HELP, rich_help_panel=FITTING)
]
_FLOPS_HELP = "How C counts: exact, 6nd or, of others' data, given."
Flops = Annotated[
    str | None,
    typer.Option("--flops", "--flops-as", help=_FLOPS_HELP, rich_help_panel=FITTING),
]
FlopsAs = Annotated[
    str | None, typer.Option("--flops-as", help=_FLOPS_HELP, rich_help_panel=FITTING)
]


def number(option: str) -> Callable[[str], float]:
    """Return the reader of an option of FLOPs, parameters or tokens: 1e18, 70B, 2PFd.

    It raises an `InputError` that names the option and quotes what is no number.
    """

    def read(text: str) -> float:
        try:
            return read_number(text)
        except ValueError as error:
            raise InputError(f"{option}: {error}") from error

    return read


INTERRUPTED = 130
"""Exit code after a Ctrl-C, as shells have it."""


class Told(SystemExit):
    """An end of which the user has been told."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """Where what a sweep measures goes, and whether its plan may grow."""

    project: ProjectOption = None
    tracking_uri: TrackingUri = None
    extend: Annotated[
        bool,
        typer.Option("--extend", help="Let the sweep add trials to the plan of its name."),
    ] = False


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Options that select the rows and columns of a table."""

    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--columns",
            metavar="KEY=COLUMN,...",
            help="Which column is what, for tables of others: params, tokens, flops (two of "
            "these), loss, loss_stderr, budget, weight, run (whose last point counts), trunk "
            "(whose noise is shared). Common names are known. Repeatable.",
            rich_help_panel=READING,
        ),
    ] = None
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            metavar="COLUMN=VALUE",
            help="Select rows, or one of several kinds; repeatable.",
            rich_help_panel=READING,
        ),
    ] = None
    loss: Annotated[
        str | None,
        typer.Option(
            "--loss", metavar="COLUMN", help="The loss to fit, if another.", rich_help_panel=READING
        ),
    ] = None
    loss_unit: Annotated[
        str | None,
        typer.Option(
            "--loss-unit",
            metavar="UNIT",
            help="What a loss of others is measured in: nats, bits (a token), bits_per_byte, "
            "nats_per_byte or perplexity, of which the logarithm is taken.",
            rich_help_panel=READING,
        ),
    ] = None
    best_of: Annotated[
        list[str] | None,
        typer.Option(
            "--best-of",
            metavar="COLUMN,...",
            help="Of runs of equal N and D, keep the setting of these columns that has the "
            "lowest loss, such as lr,batch_size.",
            rich_help_panel=READING,
        ),
    ] = None
    pool: Annotated[
        bool,
        typer.Option(
            "--pool",
            help="Fit runs together although a column tells runs of equal N and D apart.",
            rich_help_panel=READING,
        ),
    ] = False
    all_points: Annotated[
        bool,
        typer.Option(
            "--all-points",
            help="Fit every point of training curves, with the noise of its run; the default is "
            "the last point of each run, since others are not decayed.",
            rich_help_panel=READING,
        ),
    ] = False

    def reading(self, **rest: Any) -> Reading:
        """Return these options as a `Reading`; `rest` are further fields of it.

        Raises
        ------
        InputError
            If an option cannot be understood.
        """
        from analysis.foreign import parse_columns
        from analysis.loss_units import parse_loss_unit
        from orchestrator.reading import Reading, parse_where

        return Reading(
            columns=parse_columns(self.columns or []),
            where=parse_where(self.where or []),
            loss=self.loss,
            loss_unit=parse_loss_unit(self.loss_unit),
            best_of=tuple(self.best_of or ()),
            pool=self.pool,
            all_points=self.all_points,
            **rest,
        )


@dataclass(frozen=True, kw_only=True)
class Data:
    """A source, and which of its observations are taken."""

    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A project or a table (.csv, .tsv, .jsonl, .json or .parquet), by path or URI "
            "(s3://, gs://), or mlflow:EXPERIMENT.",
        ),
    ]
    drop_largest: Annotated[
        int,
        typer.Option(
            "--drop-largest",
            metavar="K",
            help="Leave out losses from the K-th largest on.",
            rich_help_panel=READING,
        ),
    ] = 0
    budgets: Annotated[
        str,
        typer.Option(
            "--budgets",
            metavar="auto|none",
            help="Whether budgets are found where C comes in groups and no column names them.",
            rich_help_panel=READING,
        ),
    ] = "auto"
    roles: Annotated[
        str | None,
        typer.Option(
            "--roles",
            metavar="ROLE,...",
            help="What a project's runs were planned as: grid,replicate unless given; also "
            "probe, held-out, confirm.",
            rich_help_panel=READING,
        ),
    ] = None
    tracking_uri: Annotated[
        str | None,
        typer.Option(
            "--tracking-uri",
            metavar="URI",
            help="MLflow's store, such as sqlite:///mlflow.db. Default: MLFLOW_TRACKING_URI",
            rich_help_panel=READING,
        ),
    ] = None

    def open(self, rows: Rows) -> Source:
        """Open the source."""
        from orchestrator.planner import FIT_ROLES
        from orchestrator.source import open_source

        if self.budgets not in ("auto", "none"):
            raise InputError(f"--budgets {self.budgets}: it is auto or none")
        roles = tuple(part.strip() for part in self.roles.split(",")) if self.roles else FIT_ROLES
        reading = rows.reading(
            drop_largest=self.drop_largest,
            find_budgets=self.budgets == "auto",
            roles=roles,
            tracking_uri=self.tracking_uri,
        )
        return open_source(self.source, reading)


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How laws are fitted."""

    level: Annotated[
        float,
        typer.Option(
            "--level", help="Coverage of intervals, between 0 and 1.", rich_help_panel=FITTING
        ),
    ] = 0.9
    objective: Annotated[
        str,
        typer.Option(
            "--objective", help="Loss of the residuals: squares or huber.", rich_help_panel=FITTING
        ),
    ] = "squares"
    delta: Annotated[
        float,
        typer.Option("--delta", help="Huber's threshold, in ln L.", rich_help_panel=FITTING),
    ] = 1e-3
    pin: Annotated[
        list[str] | None,
        typer.Option(
            "--pin",
            metavar="NAME=VALUE",
            help="Hold a constant of the laws, such as E=1.7; repeatable.",
            rich_help_panel=FITTING,
        ),
    ] = None

    def convention(self, params: str | None, flops_as: str | None) -> Convention:
        """How N and C are counted."""
        from orchestrator.reading import Convention

        n, c = cast(Any, params), cast(Any, flops_as)
        return Convention(params=n, flops=c, level=self.level)

    def method(self) -> Method:
        """How constants are estimated."""
        from analysis.fitting import Method

        objective = cast(Any, self.objective)
        return Method(objective=objective, delta=self.delta, pinned=_pinned(self.pin or []))


@dataclass(frozen=True, kw_only=True)
class Checking:
    """What is said of the laws beside their constants."""

    intervals: Annotated[
        str,
        typer.Option(
            "--intervals",
            help="Of constants and exponents: t, profile, bootstrap (pairs) or cluster.",
            rich_help_panel=FITTING,
        ),
    ] = "t"
    heldout: Annotated[
        int | None,
        typer.Option(
            "--heldout",
            metavar="K",
            help="Largest budgets to predict from those below; 0 for none. Default: up to 3.",
            rich_help_panel=FITTING,
        ),
    ] = None
    undecayed: Annotated[
        bool,
        typer.Option(
            "--undecayed",
            help="Draw the envelope over undecayed points of training curves: more, and biased.",
            rich_help_panel=FITTING,
        ),
    ] = False

    def study(self, source: Source, convention: Convention, fitting: Fitting) -> Study:
        """Study a source so."""
        return source.study(
            convention,
            method=fitting.method(),
            undecayed=self.undecayed,
            heldout=self.heldout,
            intervals=cast(Any, self.intervals),
        )


@dataclass(frozen=True, kw_only=True)
class Price:
    """What a FLOP costs."""

    gpu: Annotated[
        str | None, typer.Option("--gpu", help="A GPU type, such as H100.", rich_help_panel=PRICE)
    ] = None
    price_per_gpu_hour: Annotated[
        float | None,
        typer.Option(
            "--price-per-gpu-hour", help="What an hour of it costs, dollars.", rich_help_panel=PRICE
        ),
    ] = None
    mfu: Annotated[
        float | None,
        typer.Option(
            "--mfu",
            help="Share of its peak that training reaches. Default: 0.4.",
            rich_help_panel=PRICE,
        ),
    ] = None

    def rate(self) -> Rate | None:
        """None where neither type nor price is given."""
        from analysis.diagnosis import MFU
        from orchestrator.verdict import rate_of

        return rate_of(self.gpu, self.price_per_gpu_hour, MFU if self.mfu is None else self.mfu)


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The cluster that a plan is shown for, in place of what its file says."""

    gpu: Annotated[
        str | None, typer.Option("--gpu", help="A GPU type, such as H100.", rich_help_panel=CLUSTER)
    ] = None
    gpus_per_node: Annotated[
        int | None,
        typer.Option("--gpus-per-node", help="Default: 8.", rich_help_panel=CLUSTER),
    ] = None
    gpu_memory: Annotated[
        float | None,
        typer.Option(
            "--gpu-memory",
            metavar="GB",
            help="Memory of each GPU, of a type that isoflop does not know.",
            rich_help_panel=CLUSTER,
        ),
    ] = None
    mps: Annotated[
        bool | None,
        typer.Option(
            "--mps/--no-mps",
            help="Whether NVIDIA's Multi-Process Service runs on the nodes.",
            rich_help_panel=CLUSTER,
        ),
    ] = None
    nodes: Annotated[
        int | None, typer.Option("--nodes", help="Default: 1.", rich_help_panel=CLUSTER)
    ] = None
    cpus_per_node: Annotated[
        int | None,
        typer.Option("--cpus-per-node", help="Default: 8 a GPU.", rich_help_panel=CLUSTER),
    ] = None
    price_per_gpu_hour: Annotated[
        float | None,
        typer.Option(
            "--price-per-gpu-hour", help="What an hour of one GPU costs.", rich_help_panel=CLUSTER
        ),
    ] = None

    def applied(self, spec: SweepSpec) -> SweepSpec:
        """The spec with this cluster."""
        from orchestrator.spec import with_cluster

        found = with_cluster(spec, **asdict(self))
        if self.price_per_gpu_hour is not None and found.cluster.gpu is None:
            raise InputError(
                f"--price-per-gpu-hour is {self.price_per_gpu_hour:g}, but this cluster has no "
                "GPUs: add --gpu, such as H100"
            )
        return found


def _pinned(items: list[str]) -> dict[str, float]:
    found = {}
    for item in items:
        name, _, value = item.partition("=")
        try:
            found[name.strip()] = read_number(value)
        except ValueError as error:
            raise InputError(f"--pin {item}: write NAME=VALUE, such as E=1.7") from error
    return found


def console(*, stderr: bool = False) -> Console:
    """Where a verb prints for people."""
    from orchestrator.lasting import LastingConsole

    # The stream itself, not its name: Ray's chatter is kept off by redirecting the name.
    made = LastingConsole(file=sys.stderr if stderr else sys.stdout)
    if not made.is_terminal:
        made.width = max(made.width, 160)  # a pipe has no width: do not fold tables
    return made


def show_plain_warnings() -> None:
    """Have every `PlainWarning` printed on stderr as a sentence, once, without a source line."""
    usual, shown = warnings.showwarning, set[str]()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, PlainWarning):
            usual(message, category, *where, **more)
        elif str(message) not in shown:
            shown.add(str(message))
            console(stderr=True).print(f"! {message}", style="yellow")

    warnings.showwarning = show


def say(text: str) -> None:
    """Print a sentence on stderr; control characters in it are shown, not obeyed."""
    print(f"isoflop: {visible(text)}", file=sys.stderr)


def print_json(value: dict[str, Any]) -> None:
    """What `--json` promises: one object."""
    print(json.dumps(value, indent=2, allow_nan=False))


def require_positive(name: str, value: float | None) -> None:
    """Refuse a number of FLOPs that is none.

    Raises
    ------
    InputError
        With its name and value.
    """
    if value is not None and not 0 < value < float("inf"):
        raise InputError(f"{name} is {value}; it must be a positive number of FLOPs")
