"""
Files on disk and on the Hub: written safely, checked, and described by a model card. Knows configurations as files
have them, and nothing about models or layers. May import `registration`.
"""
