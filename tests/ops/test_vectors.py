import json

import torch

from tests.ops import vectors


def test_this_cpu_has_the_stored_bits(monkeypatch):
    """Of the float32 rows at T=1; `python -m tests.ops.vectors` looks at all of them."""
    monkeypatch.setattr(vectors, "DTYPES", {"float32": torch.float32})
    monkeypatch.setattr(vectors, "TEMPERATURES", (1.0,))
    stored = json.loads(vectors.STORED.read_text())
    found = dict(vectors.checksums(torch.device("cpu")))
    assert len(stored) == 81 and len(found) == 9
    assert all(stored[key] == found[key] for key in found)
