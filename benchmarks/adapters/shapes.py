"""The shapes of known models' linear layers, which adapters of all of them have."""

Shape = tuple[int, int]

# (d_out, d_in) -> number of modules of that shape, by model: all linear layers of all blocks
MODELS: dict[str, dict[Shape, int]] = {
    "MiniLM-L6": {(384, 384): 24, (1536, 384): 6, (384, 1536): 6},
    "RoBERTa-large": {(1024, 1024): 96, (4096, 1024): 24, (1024, 4096): 24},
    "Llama-3-8B": {(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 64, (4096, 14336): 32},
}
RANKS = {"MiniLM-L6": 8, "RoBERTa-large": 8, "Llama-3-8B": 16}
