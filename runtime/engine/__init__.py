"""The engine: from OpenAI requests to steps of the pipeline and back to text.

`openai` reads requests and shapes answers, `tokenizer` and `template` make prompts of them,
`scheduler` decides what each step computes, `engine` runs the loop over a `runner`.
"""
