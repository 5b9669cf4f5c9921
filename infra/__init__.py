"""The ground floor: storage, the Ray session, metrics, configuration and logs; imports no floor above."""
