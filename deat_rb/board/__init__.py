"""A leaderboard in a folder: submitting, ranking, verifying, and its pages."""
