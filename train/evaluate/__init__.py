"""Zero-shot classification and retrieval on suites in the folder layout of CLIP_benchmark."""
