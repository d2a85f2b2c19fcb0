"""The names that settings take, each list written once."""

from typing import Literal

TaskName = Literal["clip", "complexity"]
SourceName = Literal["scenes", "folder", "webdataset", "parquet", "tfds", "ratings"]
DistractorSource = Literal["scenes", "folder", "webdataset", "parquet"]
Dtype = Literal["bfloat16", "float32"]
Remat = Literal["none", "dots", "full"]  # from the fastest step to the smallest
FreezeGroup = Literal["image", "text", "exits", "temperature"]

ExitPool = Literal["cls", "mean", "first_patch"]
ExitStart = Literal["final", "random"]
ExitHeadName = Literal["linear", "adapter", "attention"]
Temperature = Literal["own", "shared"]

ScorerHead = Literal["regression", "classification"]
ClassWeights = Literal["none", "balanced"]
Target = Literal["rating", "regret"]
RegretName = Literal["loss", "kl", "cosine"]
PooledNorm = Literal["whole", "parts"]
Fit = Literal["sgd", "ridge"]
ComplexityPool = Literal["mean", "statistics"]

Categories = Literal["column", "prefix"]
Resize = Literal["squash", "crop"]
Interpolation = Literal["bicubic", "bilinear"]
Normalise = Literal["half", "openai", "imagenet"]

Optimizer = Literal["adamw", "muon"]
Direction = Literal["symmetric", "image_to_text"]
LossName = Literal["softmax", "sigmoid"]
ScoreCalibrationName = Literal["none", "affine"]
