"""The leaderboard's HTML pages and the data that they show."""
