"""Why a draft accepts less than it could."""
