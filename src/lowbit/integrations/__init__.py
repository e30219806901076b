"""Other people's libraries. Each module here stands alone, and imports what is optional only when it is used."""
