"""Windows of a file, written and opened in this process, and a ring of them without a network."""

from itertools import pairwise

import numpy as np

from localreason.cluster.window import LayerWindow, WindowOptions
from localreason.quant.gguf import ModelFile, padded
from localreason.runtime.engine import Span


def write_window(file, window, path):
    """The file that a node would put together from what it is sent."""
    with path.open("wb") as out:
        out.write(window.header)
        for part in window.parts:
            data = part.data + b"".join(file.read(part))
            out.write(data.ljust(padded(len(data)), b"\0"))
    return path


class LocalRing:
    """Runs a batch through windows cut at `cuts`, one after the other."""

    def __init__(self, path, cuts, folder, n_context=512, n_sequences=4, n_batch=64):
        self.file = ModelFile(path)
        bounds = [0, *cuts, self.file.n_layers]
        options = WindowOptions(n_context, n_sequences, n_batch)
        self.windows = []
        for first, end in pairwise(bounds):
            is_last = end == self.file.n_layers
            name = folder / f"{path.stem}-{first}-{end}.gguf"
            write_window(self.file, self.file.window(first, end, is_last), name)
            self.windows.append(LayerWindow(name, options, 1, 0, is_last))

    def decode(self, spans):
        rows = self.file.embed([token for span in spans for token in span.tokens])
        # What comes over a wire has no tokens in it.
        blank = [Span(s.sequence_id, s.position, [0] * len(s.tokens), s.n_logits) for s in spans]
        for window in self.windows:
            rows = np.array(window.run(blank, rows))
        return rows

    def fork(self, source, target, n_tokens):
        for window in self.windows:
            window.fork(source, target, n_tokens)

    def rewind(self, sequence, n_tokens):
        for window in self.windows:
            window.rewind(sequence, n_tokens)

    def close(self):
        for window in self.windows:
            window.close()
