"""Build small sequential models: any contiguous run of their parts is a pipeline stage."""
