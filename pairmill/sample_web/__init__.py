"""Real pictures with real names, and a server that serves them and misbehaves as the web does."""
