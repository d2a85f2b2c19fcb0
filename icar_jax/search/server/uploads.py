"""Reads the image file of a multipart upload."""

from __future__ import annotations

import asyncio

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from icar_jax.search.server.errors import RequestError

FIELD = "image"
# OpenAPI description of the upload; the endpoint parses the body itself to limit the number of parts.
OPENAPI = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [FIELD],
                    "properties": {FIELD: {"type": "string", "format": "binary", "description": "An image file."}},
                }
            }
        },
    }
}


async def read_upload(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """Bytes of the file in the field `image`.

    Raises RequestError: 408 after `timeout_s`, 413 beyond `max_bytes` (much larger bodies are cut off earlier, see guards),
    and 422 for a body without such a file.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise RequestError(422, "upload", f"expected multipart/form-data with a file in the field {FIELD!r}")
    try:
        async with asyncio.timeout(timeout_s):
            async with request.form(max_files=1, max_fields=4) as form:
                file = form.get(FIELD)
                if not isinstance(file, UploadFile):
                    raise RequestError(
                        422, "upload", f"expected a file in the field {FIELD!r}, found fields {sorted(form)[:4]}"
                    )
                data = await file.read(max_bytes + 1)
    except TimeoutError:
        raise RequestError(408, "upload-slow", f"the upload did not arrive within {timeout_s:g} s") from None
    except HTTPException as error:
        raise RequestError(422, "upload", f"the body is not valid multipart/form-data: {error.detail}") from None
    except ClientDisconnect:
        raise RequestError(422, "upload", "the client disconnected during the upload") from None
    except (ValueError, KeyError) as error:
        raise RequestError(422, "upload", f"the body is not valid multipart/form-data: {error}") from None
    if len(data) > max_bytes:
        raise RequestError(413, "upload-bytes", f"the file exceeds the limit of {max_bytes:,} bytes")
    if not data:
        raise RequestError(422, "upload", f"the file in the field {FIELD!r} is empty")
    return data
