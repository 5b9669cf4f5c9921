"""From (image URL, caption) rows to raw shards: plan, fetch, filter, resize, write."""
