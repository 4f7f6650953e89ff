"""Families of models, each behind the interface of `Pipe`: what they differ in is how a prompt becomes a condition."""
