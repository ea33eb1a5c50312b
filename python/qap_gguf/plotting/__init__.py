"""Pictures of scores and of kept patches."""
