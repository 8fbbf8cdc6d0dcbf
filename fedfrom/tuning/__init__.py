"""`fedfrom merge --tune`: a method and a scale chosen by scores on a user's rows. Needs transformers and PEFT."""
