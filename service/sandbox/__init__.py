"""An upstream of our own: the vendor's API with real image processing, for development and tests.

It is written from the vendor's document alone and imports nothing of the rest of the package, so that the gateway's
client and this server are two readings of one text which check each other.

    server.py       listens: `running` inside a process, `serve` as a process; cuts connections when told to
    app.py          the ASGI application: `create_sandbox(SandboxConfig)`, the routes
    upstream.py     what the vendor's calls do: accept a task, tell its state, hand out its files
    control.py      the other side: dials, accounts, the journal, over `/_control/...` or in the process
    delivery.py     how an answer leaves: whole, torn, as a page of HTML, or not at all
    workshop.py     runs the tasks off the event loop, takes them up again after a restart
    store.py        accounts, tasks and their files, in a folder that does not grow without bound
    imaging/        the four kinds of work, on Pillow, OpenCV and vtracer, imported when first needed

    dials.py        what can be dialled, with a table
    forms.py        the vendor's form fields, typed and within range
    wire.py         the vendor's answers and messages
    accounts.py     prepaid uses and yuan
    journal.py      the requests that were received
    asgi.py         the little of HTTP that all of this needs

Over HTTP the control side is `GET|PUT /_control/dials`, `GET /_control/accounts`, `PUT /_control/accounts/{user_key}`,
`GET /_control/requests` and `POST /_control/reset`.
"""
