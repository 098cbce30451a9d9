"""A tiny deterministic embedding model: hashed words. Fast, and near enough where meaning does not matter."""

import re
import zlib

import numpy as np
from langchain_core.embeddings import Embeddings


class HashEmbeddings(Embeddings):
    "Counts of hashed words, scaled to unit length."

    def __init__(self, dimensions: int = 128, salt: str = "") -> None:
        self.dimensions, self.salt, self.model = dimensions, salt, f"hash-{dimensions}{salt}"
        self.embedded = 0

    def _vector(self, text: str) -> list[float]:
        vector = np.full(self.dimensions, 1e-3)
        for word in re.findall(r"\w+", text.lower()):
            vector[zlib.crc32((self.salt + word).encode()) % self.dimensions] += 1
        return (vector / np.linalg.norm(vector)).tolist()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        self.embedded += len(texts)
        return [self._vector(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return self._vector(text)
