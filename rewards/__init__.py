"""The rewards that come with UniRG, one metric a file, each found through its entry point like a third party's.

They import nothing of unirg but `unirg.scoring.contract` and `unirg.extraction`.
"""
