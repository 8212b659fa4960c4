"""Ways to break what drafttrain reads: version folders, spool files, requests.

*Torn* is what accidents do: the content no longer has the hash it was published with. *Forged* is
what a faulty or hostile publisher does: hashes and digests are right, the content is not.
"""
