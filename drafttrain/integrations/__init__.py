"""Where drafttrain meets other people's software: one folder or file for each."""
