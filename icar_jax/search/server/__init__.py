"""`icar serve`: a page and a JSON API over a store. Importing this needs nothing of the [search] extra; its modules do."""
