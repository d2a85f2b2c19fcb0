"""Request and response schemas of the JSON API, from which FastAPI generates the OpenAPI description."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field, StringConstraints

MAX_K = 500
Query = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000)]
Count = Annotated[int, Field(ge=1, le=MAX_K, description="Maximum number of results.")]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Exit = Annotated[int, Field(ge=1, le=1000)]


class Filters(BaseModel):
    """Search filters and options."""

    k: Count = 24
    min_complexity: Share | None = Field(None, description="Only images with at least this complexity; excludes unscored ones.")
    max_complexity: Share | None = Field(None, description="Only images with at most this complexity; excludes unscored ones.")
    exits: list[Exit] = Field([], max_length=64, description="Only images embedded at one of these exits, in executed blocks.")
    exact: bool = Field(False, description="Exact search, even if the store has a vector index.")

    def where(self) -> str | None:
        """SQL filter on the store's columns; None without filters. Built here, since clients must not send SQL."""
        parts = []
        if self.min_complexity is not None:
            parts.append(f"complexity >= {self.min_complexity!r}")
        if self.max_complexity is not None:
            parts.append(f"complexity <= {self.max_complexity!r}")
        if self.exits:
            parts.append(f"exit IN ({', '.join(str(exit) for exit in sorted(set(self.exits)))})")
        return " AND ".join(parts) or None


class TextSearch(Filters):
    """A search by text."""

    query: Query


class Hit(BaseModel):
    """A search hit."""

    id: str = Field(description="SHA-256 of the file; `/api/images/{id}` serves it.")
    name: str = Field(description="File name.")
    path: str
    caption: str | None
    score: float = Field(description="In (0, 1), comparable between queries: how much better this query fits than other texts.")
    cosine: float = Field(description="Similarity of query and image; comparable only within one query.")
    complexity: float | None = Field(description="In [0, 1]; null if not scored.")
    exit: int = Field(description="Number of blocks executed to embed the image.")


class Verdict(BaseModel):
    """Whether nothing in the store seems to match the query."""

    nothing_here: bool
    statistic: float | None = Field(description="How well the query fits its best hits; below the threshold nothing matches.")
    threshold: float | None


class Latency(BaseModel):
    """Milliseconds by part. Queries encoded as one batch each count the time of the whole batch."""

    queue: float
    decode: float
    encode: float
    search: float
    total: float


class Answer(BaseModel):
    """Search results, best first."""

    hits: list[Hit]
    verdict: Verdict
    truncated: bool = Field(description="The query exceeded the model's context length and was truncated.")
    latency_ms: Latency


class ExitShare(BaseModel):
    """Number and fraction of the images embedded at one exit."""

    exit: int
    images: int
    share: float


class Limits(BaseModel):
    """Limits of a request."""

    k: int
    upload_bytes: int
    pixels: int


class StoreInfo(BaseModel):
    """Information about the store."""

    images: int
    scored: int = Field(description="Images with a complexity score.")
    exits: list[ExitShare] = Field(description="Ascending; the last is full depth.")
    embed_dim: int
    model: dict[str, str] = Field(description="SHA-256 of each part of the model.")
    checkpoint: str
    created_at: str
    version: int = Field(description="Increases with every change.")
    limits: Limits


class Status(BaseModel):
    """Server status."""

    status: str


class Problem(BaseModel):
    """Reason for a failed request."""

    detail: str
