"""Flower's messages: what is sent, how replies are pulled and screened, and where they wait for the merge."""
