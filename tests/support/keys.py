"""The keys of metrics.json, which fixtures fix: programs read it."""

from tests.support.places import FIXTURES

# Keys that name runs, exits and the like, by the path they lie under; digits are exits.
NAMED = {
    "runs": "RUN", "runs/RUN/intervals": "DIRECTION", "runs/RUN/intervals/DIRECTION": "METRIC", "cost": "RUN",
    "regret/pcc": "RUN", "nuisance": "NUISANCE", "nuisance/NUISANCE": "LEVEL", "nuisance/NUISANCE/LEVEL/pcc": "RUN",
}  # fmt: skip
OF_BUNDLES = ("routing", "runs/RUN/found")  # from the bundle's description, whose keys are not those of metrics.json


def key_paths(value, path=""):
    """Returns the paths of all keys in JSON data, each once, in order."""
    if isinstance(value, list):
        parts = [("ITEM", item) for item in value if isinstance(item, dict)]
    elif isinstance(value, dict) and path not in OF_BUNDLES:
        parts = [(NAMED.get(path, "EXIT" if key.isdigit() else key), item) for key, item in value.items()]
    else:
        return []
    found = {}
    for name, item in parts:
        under = f"{path}/{name}".lstrip("/")
        found |= dict.fromkeys([under, *key_paths(item, under)])
    return list(found)


def known_keys(kind):
    """Returns the paths of all keys that a 'retrieval' or 'complexity' evaluation may have, in order."""
    return (FIXTURES / "metrics" / f"{kind}.txt").read_text(encoding="utf-8").splitlines()


def require_known_keys(metrics, kind):
    """Asserts that an evaluation has known keys only, in their order."""
    found = key_paths(metrics)
    assert found == [path for path in known_keys(kind) if path in found]
