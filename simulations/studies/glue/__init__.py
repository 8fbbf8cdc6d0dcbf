"""Which method and which scale merge adapters of several GLUE tasks best: one body, each task under its own head."""
