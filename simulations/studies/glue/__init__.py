"""Which method and which scale merge adapters of several GLUE tasks best: bodies merged, each task under its own head."""
