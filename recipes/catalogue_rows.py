"""Reads the rows of the catalogue with MiniLM and writes src/manyheads/catalogue/rows.safetensors, for the search by meaning.

    python recipes/catalogue_rows.py

Run it after a row's name, title, `what` or line in asked.json has changed. Until then the search reads such rows anew at every
call, which is slower but right.
"""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import save_file

from manyheads.catalogue import methods
from manyheads.catalogue.meaning import ROWS, fingerprint_of, row_texts, text_embedding


def main() -> None:
    texts = [text for m in methods() for text in row_texts(m)]
    rows = np.stack([text_embedding(text) for text in texts]).astype(np.float16)
    save_file(
        {"rows": rows}, str(ROWS), metadata={"fingerprints": json.dumps([fingerprint_of(text) for text in texts])}
    )
    print(f"{len(texts)} texts, {ROWS.stat().st_size:,} bytes: {ROWS}")


if __name__ == "__main__":
    main()
