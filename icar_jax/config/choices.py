"""The names that settings take, each list written once."""

from typing import Literal

TaskName = Literal["clip", "complexity"]
SourceName = Literal["scenes", "folder", "webdataset", "parquet", "tfds", "ratings"]
DistractorSource = Literal["scenes", "folder", "webdataset", "parquet"]
Dtype = Literal["bfloat16", "float32"]
Remat = Literal["none", "dots", "full"]  # from the fastest step to the smallest
FreezeGroup = Literal["image", "image_trunk", "text", "text_trunk", "exits", "temperature"]

ExitPool = Literal["cls", "mean", "first_patch", "cls_mean"]
Head = Literal["", "cls", "mean", "cls_mean"]
Projection = Literal["", "linear", "linear_mlp", "mlp"]
ExitStart = Literal["final", "random"]
ExitHeadName = Literal["linear", "adapter", "attention"]
Temperature = Literal["own", "shared"]
ReductionName = Literal["none", "tome", "pitome", "crossget", "drop"]
CrossLossName = Literal["crossget", "jensen_shannon"]

ScorerHead = Literal["regression", "classification"]
ClassWeights = Literal["none", "balanced"]
Target = Literal["rating", "regret"]
RegretName = Literal["loss", "kl", "cosine"]
PooledNorm = Literal["whole", "parts"]
Fit = Literal["sgd", "ridge"]
ComplexityPool = Literal["mean", "statistics"]

Categories = Literal["column", "prefix"]
Resize = Literal["squash", "crop", "init"]
Interpolation = Literal["bicubic", "bilinear", "init"]
Normalise = Literal["half", "openai", "imagenet", "init"]

Optimizer = Literal["adamw", "muon"]
Direction = Literal["symmetric", "image_to_text"]
LossName = Literal["softmax", "sigmoid"]
ScoreCalibrationName = Literal["none", "affine"]
