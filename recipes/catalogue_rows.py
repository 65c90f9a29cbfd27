"""Reads the rows of the catalogue with MiniLM and writes src/manyheads/catalogue/rows.safetensors, which the search by meaning uses.

    python recipes/catalogue_rows.py

Run it after a row's name, title or `what` has changed. Until then the search reads such rows anew at every call, which is slower but right.
"""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import save_file

from manyheads.catalogue import methods
from manyheads.catalogue.meaning import ROWS, embedding, fingerprint_of, row_text


def main() -> None:
    texts = [row_text(m) for m in methods()]
    rows = np.stack([embedding(text) for text in texts]).astype(np.float16)
    save_file(
        {"rows": rows}, str(ROWS), metadata={"fingerprints": json.dumps([fingerprint_of(text) for text in texts])}
    )
    print(f"{len(texts)} rows, {ROWS.stat().st_size:,} bytes: {ROWS}")


if __name__ == "__main__":
    main()
