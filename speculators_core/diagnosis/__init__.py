"""Why a draft accepts less than it could, and the reports that say so."""
