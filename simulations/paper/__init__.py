"""Section 5.2 of the paper: adapters and models of QNLI, RTE and WNLI under one head, merged by every method."""
