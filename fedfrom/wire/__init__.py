"""Flower's messages: what is sent, how replies are pulled and screened, and where their states wait for the merge."""
