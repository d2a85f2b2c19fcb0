"""What the JSON API takes and gives; FastAPI makes the OpenAPI description of it."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field, StringConstraints

MAX_K = 500
Query = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000)]
Count = Annotated[int, Field(ge=1, le=MAX_K, description="Results at most.")]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Exit = Annotated[int, Field(ge=1, le=1000)]


class Filters(BaseModel):
    """Which images a search looks at, and how."""

    k: Count = 24
    min_complexity: Share | None = Field(None, description="Only images at least so complex; unscored ones are left out.")
    max_complexity: Share | None = Field(None, description="Only images at most so complex; unscored ones are left out.")
    exits: list[Exit] = Field([], max_length=64, description="Only images embedded at one of these exits, in executed blocks.")
    exact: bool = Field(False, description="Compare with every image, although the store has a vector index.")

    def where(self) -> str | None:
        """The filter on the store's columns. Clients cannot write one themselves: it is a language, and this is a network."""
        parts = []
        if self.min_complexity is not None:
            parts.append(f"complexity >= {self.min_complexity!r}")
        if self.max_complexity is not None:
            parts.append(f"complexity <= {self.max_complexity!r}")
        if self.exits:
            parts.append(f"exit IN ({', '.join(str(exit) for exit in sorted(set(self.exits)))})")
        return " AND ".join(parts) or None


class TextSearch(Filters):
    """A search by words."""

    query: Query


class Hit(BaseModel):
    """An image that was found."""

    id: str = Field(description="SHA-256 of the file; its picture is at `/api/images/{id}`.")
    name: str = Field(description="Name of the file.")
    path: str
    caption: str | None
    score: float = Field(description="In (0, 1), comparable between queries: how much better the query fits than others do.")
    cosine: float = Field(description="Of query and image; comparable within one query only.")
    complexity: float | None = Field(description="In [0, 1]; null where it was not scored.")
    exit: int = Field(description="Blocks that were executed to embed the image.")


class Verdict(BaseModel):
    """Whether the store seems to hold nothing that the query describes."""

    nothing_here: bool
    statistic: float | None = Field(description="What was measured; below the threshold nothing matches.")
    threshold: float | None


class Latency(BaseModel):
    """Milliseconds by part. Queries that wait together are encoded together, and each counts all of it."""

    queue: float
    decode: float
    encode: float
    search: float
    total: float


class Answer(BaseModel):
    """The images found, best first."""

    hits: list[Hit]
    verdict: Verdict
    truncated: bool = Field(description="The words were more than the model reads; the rest was left out.")
    latency_ms: Latency


class ExitShare(BaseModel):
    """Images embedded at one exit."""

    exit: int
    images: int
    share: float


class Limits(BaseModel):
    """What a request may ask for."""

    k: int
    upload_bytes: int
    pixels: int


class StoreInfo(BaseModel):
    """What is searched."""

    images: int
    scored: int = Field(description="Images with a complexity.")
    exits: list[ExitShare] = Field(description="Ascending; the last is full depth.")
    embed_dim: int
    model: dict[str, str] = Field(description="SHA-256 of the parts of the model.")
    checkpoint: str
    created_at: str
    version: int = Field(description="Another number after every change.")
    limits: Limits


class Status(BaseModel):
    """Whether the server works."""

    status: str


class Problem(BaseModel):
    """Why a request failed."""

    detail: str
