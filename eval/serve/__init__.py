"""A page and a JSON API on indices: `mmcontrast index serve`.

shelf.py     one index as it is asked here: descriptions, queries, answers
rows.py      its rows, found by where their samples lie
samples.py   the samples it was made of, in their shards
media.py     what a sample holds, drawn anew for a browser
schema.py    what requests and answers look like; the OpenAPI description is made of it
guard.py     what every request must pass and every answer carries
app.py       the routes, and the server
page/        the page itself: HTML, style and ES modules, served as they are
"""
