"""Random overrides for both programs, made from their own fields: right, wrong, out of range, and nonsense."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, get_args

import yaml
from hypothesis import strategies as st
from omegaconf import OmegaConf

from attention_visualizer.data.images import DatasetName
from attention_visualizer.models.vit_config import Pooling, PositionalEmbedding, Stem
from tests.helpers.runs import PROJECT, compose_train

CONF = PROJECT / "conf"
GROUPS = tuple(sorted(path.name for path in CONF.iterdir() if path.is_dir()))
# Text that means something to Hydra, OmegaConf, YAML, a file system or a format, or used to.
NONSENSE = (
    *("", "''", '""', "null", "None", "~", "???", "nan", "-nan", "inf", "-inf", "true", "False", "yes", "auto"),
    *("0", "-0", "-0.0", "-1", "1", "2", "3", "0.5", "1.0", "1.5", "1e-320", "1e400", "-1e30", "1e3", "1_000", "0x10"),
    *(str(2**31), str(2**32), str(2**63), str(10**30), "-" + "9" * 40, "9" * 400),
    *("[]", "[1]", "[1,2]", "[null]", "[[]]", "{}", "{a:1}", "{_target_:os.getcwd}", "[a,b", "{a:", "a,b", "a=b"),
    *("abc", "'it\\'s'", '"say \\"no\\""', "'two words'", "two words", "'a\nb'", "é", "注意力", "\u202eabc", "🙂"),
    *("${seed}", "${nope}", "${model}", "${model.embed_dim}", "${trainer.max_epochs}", "${", "$", "${seed", "'${x:'"),
    *("${now:%Y}", "${oc.env:NO_SUCH}", "${oc.env:HOME}", "${nope:1}", "${run_folder}", "${hydra:job.num}", "${..}"),
    *("choice(1,2)", "range(1,3)", "glob(*)", "int(3)", "float(abc)", "shuffle(1,2)", "interval(0,1)", "sort(2,1)"),
    *("..", "../x", "/dev/null", "/dev/null/x", "/proc/nothing", ".", "/", "x" * 300, "x" * 5000, "a/b/c", "%s", "{0}"),
    *("best", "last", "cpu", "gpu", "cuda", "cuda:99", "tpu", "mps", "16-true", "64-true", "bf16-true", "16-mixed"),
    *("ddp", "ddp_spawn", "fsdp", "deepspeed", "simple", "advanced", "pytorch", "value", "norm", "warn", "00:00:00:01"),
    *("max", "mean", "min", "png", "pdf", "random", "pretrained", "quick", "full", "all", "cls", "patches"),
)
SWITCHES = ("true", "false", "null")
CHOICES: dict[str, tuple[str, ...]] = {
    "model.positional_embedding": get_args(PositionalEmbedding),
    "model.pooling": get_args(Pooling),
    "model.stem": get_args(Stem),
    "data.name": get_args(DatasetName),
}

values = st.one_of(
    st.sampled_from(NONSENSE),
    st.integers(-3, 40).map(str),
    st.integers().map(str),
    st.floats().map(str),
    st.booleans().map(str),
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12),
    st.lists(st.integers(-2, 12), max_size=3).map(lambda numbers: str(numbers).replace(" ", "")),
)


def leaves(value: Any, name: str = "") -> list[str]:
    """The dotted names of a config's parts, the groups themselves included."""
    if not isinstance(value, Mapping):
        return [name]
    inner = [leaf for key, item in value.items() for leaf in leaves(item, f"{name}.{key}" if name else str(key))]
    return [*([name] if name else []), *inner]


@functools.cache
def train_fields() -> tuple[str, ...]:
    """Every field of train.py, with both loggers and all callbacks."""
    config = compose_train("callbacks=ema", "logger=[tensorboard,csv]")
    return tuple(leaves(OmegaConf.to_container(config, resolve=False)))


@functools.cache
def analyze_fields() -> tuple[str, ...]:
    config = yaml.safe_load((CONF / "analyze.yaml").read_text())
    return tuple(name for name in config if name not in ("defaults", "hydra"))


def assignments(fields: tuple[str, ...]) -> st.SearchStrategy[str]:
    """A known field, and a value: of any kind, or a number that may be right, or one of the field's words."""
    numbers = st.one_of(st.integers(0, 12).map(str), st.floats(0, 1).map("{:.3f}".format), st.sampled_from(SWITCHES))
    words = st.sampled_from([f"{name}={word}" for name, choices in CHOICES.items() for word in choices])
    likely = st.builds("{}={}".format, st.sampled_from(fields), numbers)
    anything = st.builds("{}={}".format, st.sampled_from(fields), values)
    return st.one_of(anything, anything, likely, words) if "model" in fields else st.one_of(anything, likely)


@st.composite
def right_ones(draw: st.DrawFn) -> list[str]:
    """A command line that shall train: any combination of what fits together, for a model of a few thousand weights."""
    heads = draw(st.sampled_from((1, 2, 3)))
    chosen = {
        "model.num_heads": heads,
        "model.embed_dim": 4 * heads * draw(st.integers(1, 4)),
        "model.num_layers": draw(st.integers(1, 3)),
        "model.mlp_dim": draw(st.integers(1, 40)),
        "model.stem": draw(st.sampled_from(get_args(Stem))),
        "model.pooling": draw(st.sampled_from(get_args(Pooling))),
        "model.positional_embedding": draw(st.sampled_from(get_args(PositionalEmbedding))),
        "model.dropout": draw(st.sampled_from((0, 0.1, 0.9))),
        "model.attention_dropout": draw(st.sampled_from((0, 0.1, 0.9))),
        "data.batch_size": draw(st.integers(1, 60)),
        "data.eval_batch_size": draw(st.integers(20, 400)),
        "data.augment": draw(st.booleans()),
        "data.rotation": draw(st.sampled_from((0, 15.0, 180))),
        "data.translation": draw(st.sampled_from((0, 2.5, 28))),
        "data.scaling": draw(st.sampled_from((0, 0.15, 0.9))),
        "data.shear": draw(st.sampled_from((0, 1))),
        "data.elastic": draw(st.sampled_from((0, 0.6, 28))),
        "data.fade": draw(st.sampled_from((0, 0.3, 1))),
        "data.split_seed": draw(st.integers(0, 2**70)),
        "optimizer": draw(st.sampled_from(("adamw", "muon"))),
        "optimizer.learning_rate": draw(st.sampled_from((1e-9, 1e-3, 0.1))),
        "optimizer.weight_decay": draw(st.sampled_from((0, 0.05, 1))),
        "optimizer.beta1": draw(st.sampled_from((0, 0.9))),
        "optimizer.beta2": draw(st.sampled_from((0, 0.99))),
        "optimizer.warmup_share": draw(st.sampled_from((0, 0.05, 0.99))),
        "optimizer.label_smoothing": draw(st.sampled_from((0, 0.05, 0.99))),
        "trainer": draw(st.sampled_from(("default", "cpu", "bf16"))),
        "trainer.max_epochs": draw(st.integers(1, 2)),
        "trainer.max_steps": draw(st.sampled_from((-1, 2, 5))),
        "trainer.limit_train_batches": draw(st.integers(1, 4)),
        "trainer.limit_val_batches": draw(st.sampled_from((1, 2, 1.0))),
        "trainer.accumulate_grad_batches": draw(st.integers(1, 3)),
        "trainer.gradient_clip_val": draw(st.sampled_from(("null", 0, 1.0))),
        "trainer.gradient_clip_algorithm": draw(st.sampled_from(("null", "norm", "value"))),
        "trainer.log_every_n_steps": draw(st.integers(1, 5)),
        "trainer.num_sanity_val_steps": draw(st.integers(-1, 2)),
        "trainer.deterministic": draw(st.sampled_from(("null", "true", "warn"))),
        "trainer.detect_anomaly": draw(st.booleans()),
        "callbacks": draw(st.sampled_from(("default", "ema", "none"))),
        "logger": draw(st.sampled_from(("tensorboard", "csv", "none", "[tensorboard,csv]"))),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "test": draw(st.sampled_from(("null", "true", "false"))),
    }
    needed = -(-int(chosen["trainer.limit_train_batches"]) // int(chosen["trainer.accumulate_grad_batches"]))
    if 0 < chosen["trainer.max_steps"] < needed:  # there would be no validation
        chosen["trainer.max_steps"] = needed
    if chosen["model.stem"] == "convolutions":
        chosen["model.patch_size"] = draw(st.sampled_from((2, 4)))
    else:
        chosen["model.patch_size"] = draw(st.sampled_from((2, 4, 7, 14, 28)))
    return [f"{name}={value}" for name, value in chosen.items()]


def oddities(fields: tuple[str, ...]) -> st.SearchStrategy[str]:
    """What is no plain assignment: additions, deletions, choices of groups, fields that do not exist, anything."""
    field = st.sampled_from(fields)
    group = st.sampled_from(GROUPS)
    chosen = st.sampled_from([path.stem for path in CONF.rglob("*.yaml")] + ["nope", "null", "[]", "[none,none]", ".."])
    return st.one_of(
        st.builds("{}{}{}={}".format, st.sampled_from(("+", "++")), field, st.sampled_from(("", ".new")), values),
        st.builds("~{}".format, field),
        st.builds("~{}={}".format, field, values),
        st.builds("{}{}={}".format, st.sampled_from(("", "+", "++")), group, chosen),
        st.builds("{}@{}={}".format, group, field, chosen),
        st.builds("{}.no_such_field={}".format, field, values),
        st.builds("{}={}".format, values, values).filter(is_no_flag),
        field,
        values.filter(is_no_flag),
    )


def is_no_flag(text: str) -> bool:
    return not text.startswith("-")


def overrides(fields: tuple[str, ...], most: int = 3) -> st.SearchStrategy[list[str]]:
    """A command line: one wrong or right thing, or several at once."""
    one = st.one_of(assignments(fields), assignments(fields), assignments(fields), oddities(fields))
    return st.lists(one, min_size=1, max_size=most)
