"""`icar serve`: a web page and a JSON API over a store. This package imports without the [search] extra; its modules do not."""
