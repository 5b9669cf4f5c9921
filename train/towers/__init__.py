"""The two towers of a dual encoder: images to features, token ids to features."""
