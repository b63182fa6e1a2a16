"""What `params.yaml` may say. Every key is known and checked; an unknown or contradictory one is refused by name."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from digits.contract import IMAGE_HEIGHT
from digits.errors import DigitsError

PARAMS_FILE = "params.yaml"

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]

# YAML reads a bare 7 as a number. The name is a folder's too, where the data are folders of pictures.
ClassName = Annotated[
    str,
    BeforeValidator(lambda name: str(name) if type(name) is int else name),
    Field(pattern=r"^[^./\\\x00-\x1f][^/\\\x00-\x1f]{0,63}$"),
]


class BadParams(DigitsError):
    """params.yaml is missing, is not YAML, or says something that is not allowed."""

    code = "bad_params"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataParams(_Section):
    """What lies in ``data/``."""

    format: Literal["idx", "folder"]
    """Four IDX files with MNIST's names, or a picture a file in ``train/CLASS/`` and ``test/CLASS/``."""
    classes: tuple[ClassName, ...] = Field(min_length=2, max_length=1000)
    """What the labels 0, 1, 2 … are called; in a folder also the names of its folders."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if twice := [name for name in self.classes if self.classes.count(name) > 1]:
            raise _contradiction("classes", f"{twice[0]!r} twice", "different names")
        if self.format == "idx" and len(self.classes) > MOST_IDX_CLASSES:
            raise _contradiction(
                "classes", f"{len(self.classes)} names", f"at most {MOST_IDX_CLASSES} where format is idx"
            )
        return self

    @property
    def labels(self) -> str:
        """The labels in words: ``0 to 9``, or the names where they say more than numbers."""
        last = len(self.classes) - 1
        if self.classes == tuple(map(str, range(len(self.classes)))):
            return f"0 to {last}"
        return f"0 to {last} ({self.classes[0]} to {self.classes[-1]})"


MOST_IDX_CLASSES: Final = 256
"""A label of an IDX file is one byte."""


class Limits(_Section):
    """How much is let pass: above ``warn`` people are told, above ``stop`` the pipeline stops."""

    warn: float = Field(ge=0.0)
    stop: float = Field(ge=0.0)

    @model_validator(mode="after")
    def _warns_before_it_stops(self) -> Self:
        if self.warn > self.stop:
            raise _contradiction("warn", self.warn, f"at most stop, which is {self.stop}")
        return self


class FeatureBounds(_Section):
    """Least and greatest value of a feature: of one image, and of a split's mean; none where left out."""

    image: tuple[float, float] | None = None
    mean: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        _check_order(self, ("image", "mean"))
        return self


Severity = Literal["stop", "warn"]


class Severities(_Section):
    """What a broken expectation does: stop the pipeline, or only warn."""

    files: Severity
    counts: Severity
    labels: Severity
    balance: Severity
    blank: Severity
    duplicates: Severity
    leaks: Severity
    features: Severity


FeatureName = Literal[
    "ink_px",
    "centroid_x_px",
    "centroid_y_px",
    "spread_x_px",
    "spread_y_px",
    "slant",
    "stroke_width_px",
    "border_ink",
    "entropy_bits",
]


class ValidateParams(_Section):
    """What the raw data must look like."""

    sha256: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]
    """File name -> SHA-256 of the very data meant; an empty mapping checks only what the data look like."""
    train_images: int = Field(gt=0)
    test_images: int = Field(gt=0)
    class_share: tuple[Share, Share]
    """Least and greatest share of each class in a split."""
    ink_share: tuple[Share, Share]
    """Bounds of a split's mean of pixel / 255."""
    min_image_ink_px: float = Field(ge=0.0)
    """Ink of the faintest image, as a number of fully inked pixels."""
    max_duplicates_within: int = Field(ge=0)
    max_duplicates_across: int = Field(ge=0)
    features: dict[FeatureName, FeatureBounds]
    """Bounds by feature (training/validation/features.py says what each is); {} bounds none."""
    odd_images: Limits
    """Share of a split's images with a feature outside its bounds for one image."""
    doubtful_labels: Limits
    """Share of a split's labels that all other images speak against, by a wide margin."""
    contradicted_labels: Limits
    """Share of a split's labels that a quick classifier of the other images would have given otherwise."""
    drift: Limits
    """Cohen's d of test against training images, for each feature, also by digit, beyond what chance explains."""
    drift_psi: Limits
    """Population stability index of each feature, beyond what chance explains."""
    severity: Severities

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        _check_order(self, ("class_share", "ink_share"))
        return self


class PrepareParams(_Section):
    """How the training file is split."""

    validation_images: int = Field(ge=10)
    samples_per_class: int = Field(ge=1, le=50)


class ReceptiveField(_Section):
    """A hidden layer whose units see ``size`` x ``size`` of the layer before, ``stride`` apart, and learn in unison."""

    size: int = Field(ge=1, le=28)
    stride: int = Field(ge=1, le=28)
    features: int = Field(ge=1, le=1024)
    """Units at each place."""
    padding: Literal["valid", "same"] = "valid"
    """same: fields reach over the edge, and see zeros there, so that there are as many places as ``stride`` allows."""

    def places(self, side: int) -> int:
        """How many there are along a side of ``side`` units."""
        return math.ceil(side / self.stride) if self.padding == "same" else (side - self.size) // self.stride + 1


_MOST_UNITS = 16384


class ModelParams(_Section):
    """The multilayer perceptron: hidden layers of dense, normalisation, activation, dropout; then a logit a class."""

    least_contrast: float = Field(gt=0.0, le=1.0)
    """An image's lightest pixel is taken for paper and its darkest for full ink, unless they differ by less than this
    share of full ink; 1 = off."""
    paper_share: Rate
    """Above 0 this share of the 24 blocks of 4 x 4 pixels along the edge, the lightest ones, are paper, and the darkest
    of these says how light paper is, in place of the lightest pixel."""
    receptive_fields: tuple[ReceptiveField, ...]
    """Hidden layers before those of ``hidden_widths`` that begin as training/receptive_fields.py says."""
    averaged_turn_deg: float = Field(ge=0.0, le=45.0)
    """An answer is the mean over the image as it is and turned by this both ways, at 3 times the work; 0 = off."""
    hidden_widths: tuple[Annotated[int, Field(ge=1, le=16384)], ...] = Field(min_length=1)
    activation: Literal["relu", "gelu", "silu", "elu", "tanh"]
    normalisation: Literal["batch", "layer", "none"]
    dropout: Rate
    l2: float = Field(ge=0.0)

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        side = IMAGE_HEIGHT
        for field in self.receptive_fields:
            if field.size > side:
                raise _contradiction("receptive_fields", f"of size {field.size}", f"at most the {side} that are left")
            side = field.places(side)
            if side * side * field.features > _MOST_UNITS:
                units = f"{side} x {side} places x {field.features} features"
                raise _contradiction("receptive_fields", units, f"at most {_MOST_UNITS} units in a layer")
        if self.paper_share and self.least_contrast == 1:
            raise _contradiction("paper_share", f"{self.paper_share}", "0 with a least_contrast of 1, which is off")
        if self.receptive_fields and self.normalisation == "layer":
            raise _contradiction("normalisation", "layer", "batch or none with receptive_fields")
        return self


class TrainParams(_Section):
    """How the perceptron is fitted."""

    epochs: int = Field(ge=1)
    free_epochs: int = Field(ge=0)
    """Epochs after those in which the weights of receptive fields no longer learn in unison."""
    free_learning_rate: float = Field(gt=0.0)
    """The schedule's peak in the free epochs."""
    batch_size: int = Field(ge=1)
    optimiser: Literal["adamw", "adam", "sgd"]
    learning_rate: float = Field(gt=0.0)
    schedule: Literal["one_cycle", "cosine", "constant"]
    warmup_share: Rate
    weight_decay: float = Field(ge=0.0)
    momentum: Rate
    label_smoothing: Rate
    outlier_share: Rate
    """Images of no class for each image of one, learnt as equally likely to be any."""
    average_share: Rate
    abstain_share: Rate
    """Share of the validation images that the threshold of abstention leaves unanswered."""
    precision: Literal["auto", "float32", "mixed_bfloat16"]

    @model_validator(mode="after")
    def _settings_belong_to_the_optimiser(self) -> Self:
        if self.weight_decay > 0 and self.optimiser != "adamw":
            raise _contradiction(
                "weight_decay", self.weight_decay, f"0 with optimiser {self.optimiser} (only adamw decays)"
            )
        if self.momentum > 0 and self.optimiser != "sgd":
            raise _contradiction("momentum", self.momentum, f"0 with optimiser {self.optimiser} (only sgd has it)")
        return self


class AugmentParams(_Section):
    """How far training images are deformed; all 0 is off."""

    rotation_rad: float = Field(ge=0.0, le=3.15)
    scale: Rate
    shear: float = Field(ge=0.0, le=2.0)
    shift_px: float = Field(ge=0.0, le=14.0)
    elastic_px: float = Field(ge=0.0, le=10.0)
    elastic_sigma_px: float = Field(ge=2.0, le=20.0)
    pen: Rate
    """Up to which share pixels get as dark as the darkest beside them (a thicker pen) or as light as the lightest."""
    neighbour_share: Rate
    """Of images into which the edge of another one comes."""

    @property
    def is_off(self) -> bool:
        """True when images are to stay as they are."""
        return self == self.turned_off()

    def turned_off(self) -> Self:
        """The same with every strength at 0."""
        return self.model_copy(update={name: 0.0 for name in type(self).model_fields if name != "elastic_sigma_px"})


class TwinParams(_Section):
    """The candidate's twin, fitted without augmentation."""

    epochs: int = Field(ge=1)


class EvaluateParams(_Section):
    """How much is measured, and what the pictures show."""

    reliability_bins: int = Field(ge=2, le=100)
    gallery_images: int = Field(ge=1, le=200)
    robustness_images: int = Field(ge=2)
    """Test images that are damaged and moved; all, if there are fewer."""
    nondigit_images: int = Field(ge=16)
    """Drawn of each kind, at least."""


class RobustnessFloors(_Section):
    """The least that each figure of robustness in metrics.json must reach; 0 asks only that it was measured."""

    robustness_images: int = Field(ge=1)
    """How many test images were damaged and moved."""
    corruption_accuracy: Share
    corruption_gain: float = Field(ge=-1.0, le=1.0)
    """Accuracy on damaged images less that of the twin without augmentation; below 0 it may be worse by so much."""
    shift1_accuracy: Share
    shift2_accuracy: Share
    thin_accuracy: Share
    thick_accuracy: Share
    nondigit_abstention: Share


class GateParams(_Section):
    """What a candidate must reach to be published."""

    min_accuracy: Share
    min_macro_f1: Share
    min_class_recall: Share
    max_ece: Share
    max_nll: float = Field(gt=0.0)
    """Mean negative log-likelihood of the true class, in nats."""
    robustness: RobustnessFloors
    max_accuracy_drop: Share
    """How far below 0 the 95 % interval of the difference to the published version's accuracy may reach."""
    max_size_bytes: int = Field(gt=0)
    """Of the version's folder."""
    max_load_s: float = Field(gt=0.0)
    """In a fresh model server, warm-up included."""
    max_latency_ms: float = Field(gt=0.0)
    """The median over calls of one image each."""
    max_latency_p99_ms: float = Field(gt=0.0)
    significance: float = Field(gt=0.0, lt=1.0)
    """A candidate worse than the published version with a smaller p-value (McNemar's test) is rejected."""

    @model_validator(mode="after")
    def _slowest_is_not_below_the_median(self) -> Self:
        if self.max_latency_p99_ms < self.max_latency_ms:
            raise _contradiction(
                "max_latency_p99_ms",
                self.max_latency_p99_ms,
                f"at least max_latency_ms, which is {self.max_latency_ms}",
            )
        return self


class ExportParams(_Section):
    """What is packed beside the model."""

    golden_images: int = Field(ge=1, le=1000)
    warmup_batch_sizes: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = Field(min_length=1)


class SearchRange(_Section):
    """Numbers from ``low`` to ``high``: whole ones where the parameter itself is a whole number."""

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _low_is_below_high(self) -> Self:
        if not self.low < self.high:
            raise _contradiction("low", self.low, f"below high, which is {self.high}")
        if self.log and self.low <= 0:
            raise _contradiction("low", self.low, "above 0 on a logarithmic scale")
        return self


class SearchParams(_Section):
    """What `python -m training search` tries, and how much of it."""

    trials: int = Field(ge=1)
    epochs: int = Field(ge=1)
    images: int = Field(ge=10)
    space: dict[
        str,
        Annotated[
            Annotated[SearchRange, Tag("range")] | Annotated[Annotated[list[Any], Field(min_length=2)], Tag("choices")],
            Discriminator(lambda came: "range" if isinstance(came, (dict, SearchRange)) else "choices"),
        ],
    ] = Field(min_length=1)
    """Dotted key of `train`, `model` or `augment` -> a range, or a list of what to choose from."""


class Params(_Section):
    """The whole of params.yaml, with the chosen profile applied."""

    seed: int = Field(ge=0, lt=2**31)
    profile: str
    data: DataParams
    validate_: ValidateParams = Field(alias="validate")
    prepare: PrepareParams
    model: ModelParams
    train: TrainParams
    augment: AugmentParams
    twin: TwinParams
    evaluate: EvaluateParams
    gate: GateParams
    export: ExportParams
    search: SearchParams
    profiles: dict[str, dict[Literal["model", "train", "augment"], dict[str, Any]]]

    @model_validator(mode="after")
    def _images_suffice(self) -> Self:
        """Counts of one section that another one must leave room for."""
        training = self.validate_.train_images - self.prepare.validation_images
        if training < 1:
            raise _contradiction(
                "prepare.validation_images",
                self.prepare.validation_images,
                f"less than validate.train_images, which is {self.validate_.train_images}",
            )
        if self.train.batch_size > training:
            raise _contradiction(
                "train.batch_size",
                self.train.batch_size,
                f"at most the {training} images that validate.train_images less prepare.validation_images leaves",
            )
        measured = min(self.evaluate.robustness_images, self.validate_.test_images)
        if self.gate.robustness.robustness_images > measured:
            raise _contradiction(
                "gate.robustness.robustness_images",
                self.gate.robustness.robustness_images,
                f"at most {measured}, the lesser of evaluate.robustness_images and validate.test_images",
            )
        return self

    @model_validator(mode="after")
    def _regularised_once(self) -> Self:
        if self.train.free_epochs > 0 and not self.model.receptive_fields:
            raise _contradiction("train.free_epochs", self.train.free_epochs, "0 without model.receptive_fields")
        if self.model.l2 > 0 and self.train.weight_decay > 0:
            raise _contradiction(
                "model.l2", self.model.l2, "0 while train.weight_decay is above 0 (choose one of them)"
            )
        return self


def load_params(path: Path) -> Params:
    """Read and check params.yaml.

    Raises:
        BadParams: naming the key, the value that came and what is allowed.
    """
    try:
        # The parser that DVC uses, so that both read the same numbers (to YAML 1.1, 3e-3 is text).
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise BadParams(
            f"cannot read {path}: {err.strerror or err}. Run from the repository root, or give --root."
        ) from err
    except (YAMLError, UnicodeDecodeError) as err:
        raise BadParams(f"{path} is not YAML: {' '.join(str(err).split())}") from err
    if not isinstance(raw, dict):
        raise BadParams(f"{path} must hold the sections {', '.join(_allowed_keys(Params))}; it holds {_short(raw)}")
    try:
        return Params.model_validate(_apply_profile(raw))
    except ValidationError as err:
        problems = "; ".join(_describe(e) for e in err.errors())
        raise BadParams(f"{path}: {problems}") from err


def change_params(params: Params, changes: Mapping[str, Any]) -> Params:
    """Params with the values of some dotted keys (``train.learning_rate``) replaced, checked as those in the file are.

    Raises:
        BadParams: naming the key, the value that came and what is allowed.
    """
    changed = params.model_dump(by_alias=True)
    for key, value in changes.items():
        section = changed
        *sections, leaf = key.split(".")
        for name in sections:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise BadParams(f"{key} is not a known key: {name} is no section of params.yaml")
        section[leaf] = value
    try:
        return Params.model_validate(changed)
    except ValidationError as err:
        raise BadParams("; ".join(_describe(e) for e in err.errors())) from err


def _apply_profile(raw: dict[str, Any]) -> dict[str, Any]:
    """Lay the chosen profile's values over the sections."""
    profiles = raw.get("profiles")
    if not isinstance(profiles, dict) or "profile" not in raw:
        return raw  # pydantic names what is missing
    name = raw["profile"]
    if name not in profiles:
        raise BadParams(
            f"profile is {_short(name)}; it must be one of {', '.join(map(str, profiles))} (see `profiles`)"
        )
    merged = dict(raw)
    for section, values in (profiles[name] or {}).items():
        if isinstance(values, dict) and isinstance(raw.get(section), dict):
            merged[section] = {**raw[section], **values}
    merged["profiles"] = {key: value or {} for key, value in profiles.items()}
    return merged


def _check_order(section: _Section, names: tuple[str, ...]) -> None:
    for name in names:
        bounds = getattr(section, name)
        if bounds is not None and bounds[0] > bounds[1]:
            raise _contradiction(name, list(bounds), "two numbers, the smaller first")


def _contradiction(name: str, value: object, allowed: str) -> PydanticCustomError:
    facts = {"name": name, "value": value, "allowed": allowed}
    return PydanticCustomError("contradiction", "{name} is {value}; allowed: {allowed}", facts)


def _describe(error: Any) -> str:
    """One pydantic error as `key is VALUE; allowed: …`."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "contradiction":
        context = error["ctx"]
        section = f"{key}." if key else ""
        return f"{section}{context['name']} is {context['value']}; allowed: {context['allowed']}"
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] == "extra_forbidden":
        return (
            f"{key} is not a known key (it is {_short(error['input'])}); allowed: {', '.join(_siblings(error['loc']))}"
        )
    return f"{key} is {_short(error['input'])}; allowed: {error['msg'].removeprefix('Input should be ')}"


def _siblings(location: tuple[Any, ...]) -> list[str]:
    """The keys that are known where an unknown one stood."""
    section: type[BaseModel] = Params
    for part in location[:-1]:
        fields = {f.alias or name: f for name, f in section.model_fields.items()}
        if part in fields:  # else a key of a mapping: its values are the section
            inner = _sections_in(fields[part].annotation)
            if not inner:
                return []
            section = inner[0]
    return _allowed_keys(section)


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]


def _allowed_keys(section: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items()]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
