"""The configs of evaluations and predictions."""

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from lad_dist.config.schema import ConfigTable, LabelName, PositiveFloat, PositiveInt, TaskDataConfig

# Keys of a training's [data] that an evaluation does not have.
OF_TRAININGS = {"test", "class_weights", "unlabelled", "unlabelled_weight"}


class ModelPathConfig(ConfigTable):
    """A model to evaluate."""

    path: str = Field(description="model folder, run folder, .onnx file, compact.safetensors, or hub name")


class EvaluateDataConfig(TaskDataConfig):
    """`[data]` of an evaluation: no training set is required, for the model knows its labels."""

    requires_train: ClassVar[bool] = False


class EvaluateConfig(ConfigTable):
    """The config of evaluate."""

    model: ModelPathConfig
    teacher: ModelPathConfig | None = Field(None, description="teacher to measure loyalty against")
    data: EvaluateDataConfig
    out: str | None = Field(
        None,
        description="JSON file for the result; of a classification, pictures of confusion and calibration stand beside "
        "it; default: only printed",
    )
    fit_temperature: bool = Field(
        False, description="also fit the temperature of a classification's logits that calibrates it (Guo et al., 2017)"
    )

    @model_validator(mode="after")
    def _nothing_of_trainings(self) -> Self:
        if self.data.test is not None:
            raise ValueError("data.test is scored by trainings; give the file as data.dev")
        if self.data.class_weights is not None:
            raise ValueError("data.class_weights are for trainings; remove them")
        if self.data.unlabelled is not None:
            raise ValueError("data.unlabelled is for trainings; remove it")
        return self


class PredictConfig(ConfigTable):
    """The arguments of predict."""

    model: str = Field(description="model folder, run folder, .onnx file, compact.safetensors, or hub name")
    file: str = Field(
        description="texts: .csv, .tsv, .jsonl, .parquet, or .txt with a text a line; for tagging CoNLL or .jsonl, for "
        "question answering SQuAD's .json"
    )
    out: str = Field(description="file for the predictions, .csv or .jsonl")
    text: str = Field("text", description="column of the texts")
    text_pair: str | None = Field(
        None, description="column of the second texts of pairs; default: text_pair where the file has it"
    )
    label: str | None = Field(
        None, description="column of the labels to compare with; default: label where the file has it"
    )
    labels: Annotated[list[LabelName], Field(min_length=2)] | None = Field(
        None, description="names of the labels in the order of the model's outputs; default: the model's own"
    )
    max_length: int | None = Field(
        None, ge=8, description="tokens of the longest sequence; default: 512, or what the model has positions for"
    )
    batch_size: PositiveInt = Field(64, description="sequences of one forward")
    temperature: PositiveFloat = Field(
        1.0,
        description="divisor of the logits of a classification or of tagging; evaluate fits it with fit_temperature",
    )
    max_answer_length: PositiveInt = Field(30, description="tokens of the longest answer to a question")
    null_score_diff_threshold: float | None = Field(
        None,
        description="questions may have no answer, where the score of none exceeds the best answer's by more; default: "
        "0 where some questions of the file have answers and some have none, otherwise each has one",
    )
