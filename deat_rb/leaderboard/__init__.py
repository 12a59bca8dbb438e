"""A leaderboard in a folder: entries, submissions, ranking, verification and pages. Submissions are untrusted input."""
