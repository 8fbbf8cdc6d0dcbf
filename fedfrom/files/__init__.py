"""Adapters and checkpoints as folders on disk: read lazily, merged a layer at a time, written whole or not at all."""
