/* A stand-in for the vendor that is no bottleneck: one thread, epoll, HTTP/1.1 with kept connections.
 *
 *     stub PORT running|finished DELAY_MS
 *
 * POST /api/submit_*_task and /api/submit_task accept a task, POST /api/check_task_status reports its state, both after
 * the delay. GET /files/... is a PNG of one pixel. GET /stats counts the checks, as JSON. Bodies (with Content-Length or
 * chunked) are discarded. It listens on 127.0.0.1 only.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define HEAD_BYTES 8192
#define OUT_BYTES 1024
#define SCRATCH_BYTES (256 * 1024)
#define EVENTS 1024
#define FIRST_COUNT 1000000000ULL

enum state { HEAD, BODY, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILER, WAIT, WRITE };
enum route { SUBMIT, CHECK, STATS, PICTURE, UNKNOWN };

struct connection {
    int fd;
    enum state state;
    enum route route;
    bool closes, paused;
    uint64_t left;        /* bytes of the body or chunk still to come */
    unsigned line;        /* length of the line of a chunk's size or of a trailer so far */
    uint64_t due;         /* ms, while it waits for the delay */
    uint64_t number;      /* of the submit or check */
    struct connection *next, *previous;
    size_t head, out, sent;
    char head_bytes[HEAD_BYTES + 1];
    char out_bytes[OUT_BYTES];
};

static const unsigned char PNG[] = {
    0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n', 0, 0, 0, 13, 'I', 'H', 'D', 'R', 0, 0, 0, 1, 0, 0, 0, 1, 8, 0, 0, 0,
    0, 0x3a, 0x7e, 0x9b, 0x55, 0, 0, 0, 10, 'I', 'D', 'A', 'T', 0x78, 0x9c, 0x63, 0x60, 0, 0, 0, 2, 0, 1, 0x48, 0xaf,
    0xa4, 0x71, 0, 0, 0, 0, 'I', 'E', 'N', 'D', 0xae, 0x42, 0x60, 0x82};

static int poller, listener;
static int port;
static bool finished;
static uint64_t delay_ms;
static struct connection waiting = {.next = &waiting, .previous = &waiting}; /* in the order in which they are due */
static char scratch[SCRATCH_BYTES];
static uint64_t submits, checks;
static unsigned run; /* tells the tasks of this run from those of another */

static uint64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void listen_for(struct connection *c, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = c};
    if (epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &event) < 0) fail("epoll_ctl");
}

static void stop_waiting(struct connection *c)
{
    if (!c->next) return;
    c->previous->next = c->next;
    c->next->previous = c->previous;
    c->next = c->previous = NULL;
}

static void drop(struct connection *c)
{
    stop_waiting(c);
    close(c->fd);
    free(c);
}

static void respond(struct connection *c, const char *status, const char *type, const void *body, size_t length)
{
    int head = snprintf(c->out_bytes, OUT_BYTES, "HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %zu\r\n%s\r\n",
                        status, type, length, c->closes ? "Connection: close\r\n" : "");
    if (head < 0 || (size_t)head + length > OUT_BYTES) fail("response");
    memcpy(c->out_bytes + head, body, length);
    c->out = (size_t)head + length;
    c->sent = 0;
    c->state = WRITE;
}

static void respond_json(struct connection *c, const char *status, const char *body)
{
    respond(c, status, "application/json", body, strlen(body));
}

static void answer(struct connection *c)
{
    char body[OUT_BYTES / 2];
    switch (c->route) {
    case SUBMIT:
        snprintf(body, sizeof body,
                 "{\"err_code\":0,\"task_id\":\"%08x-%010llu\",\"remaining_count\":%llu,\"remaining_money\":1000000}",
                 run, (unsigned long long)c->number, (unsigned long long)(FIRST_COUNT - c->number));
        respond_json(c, "200 OK", body);
        break;
    case CHECK:
        if (finished)
            snprintf(body, sizeof body,
                     "{\"err_code\":0,\"status\":\"Completed\",\"images_url\":\"http://127.0.0.1:%d/files/%llu.png\","
                     "\"remaining_count\":%llu,\"remaining_money\":1000000}",
                     port, (unsigned long long)c->number, (unsigned long long)(FIRST_COUNT - submits));
        else
            snprintf(body, sizeof body, "{\"err_code\":0,\"status\":\"Running\"}");
        respond_json(c, "200 OK", body);
        break;
    case STATS:
        snprintf(body, sizeof body, "{\"checks\":%llu}", (unsigned long long)checks);
        respond_json(c, "200 OK", body);
        break;
    case PICTURE:
        respond(c, "200 OK", "image/png", PNG, sizeof PNG);
        break;
    default:
        respond_json(c, "404 Not Found", "{}");
    }
}

/* The body has been read: answer now, or after the delay. It counts even if the client leaves meanwhile. */
static void end_request(struct connection *c)
{
    if (c->route == SUBMIT) c->number = ++submits;
    if (c->route == CHECK) c->number = ++checks;
    if (!delay_ms || (c->route != SUBMIT && c->route != CHECK)) {
        answer(c);
        return;
    }
    c->state = WAIT;
    c->due = now_ms() + delay_ms;
    c->next = &waiting;
    c->previous = waiting.previous;
    waiting.previous->next = c;
    waiting.previous = c;
}

static void refuse(struct connection *c, const char *status)
{
    c->closes = true;
    respond_json(c, status, "{}");
}

static enum route route_of(const char *method, const char *path)
{
    if (!strcmp(method, "POST") && !strncmp(path, "/api/", 5)) {
        static const char *const submit[] = {"submit_task", "submit_vector_task", "submit_face_enhance_task",
                                             "submit_seamless_task"};
        for (size_t i = 0; i < sizeof submit / sizeof *submit; i++)
            if (!strcmp(path + 5, submit[i])) return SUBMIT;
        if (!strcmp(path + 5, "check_task_status")) return CHECK;
    }
    if (!strcmp(method, "GET")) {
        if (!strcmp(path, "/stats")) return STATS;
        if (!strncmp(path, "/files/", 7)) return PICTURE;
    }
    return UNKNOWN;
}

static bool parse_length(const char *text, uint64_t *length)
{
    char *end;
    if (*text < '0' || *text > '9') return false;
    errno = 0;
    *length = strtoull(text, &end, 10);
    return !errno && (!*end || *end == ' ' || *end == '\t');
}

/* Read the head of a request, which `head_bytes` holds as a string without its last empty line. */
static void parse_head(struct connection *c)
{
    char *lines, *method, *path, *version, *words;
    bool chunked = false, expects = false;
    c->left = 0;
    c->line = 0;
    char *line = strtok_r(c->head_bytes, "\r\n", &lines);
    method = line ? strtok_r(line, " ", &words) : NULL;
    path = method ? strtok_r(NULL, " ", &words) : NULL;
    version = path ? strtok_r(NULL, " ", &words) : NULL;
    if (!version || strncmp(version, "HTTP/1.", 7)) {
        refuse(c, "400 Bad Request");
        return;
    }
    c->closes = !strcmp(version, "HTTP/1.0");
    c->route = route_of(method, path);
    while ((line = strtok_r(NULL, "\r\n", &lines))) {
        char *value = strchr(line, ':');
        if (!value) {
            refuse(c, "400 Bad Request");
            return;
        }
        *value++ = 0;
        value += strspn(value, " \t");
        if (!strcasecmp(line, "content-length")) {
            if (!parse_length(value, &c->left)) {
                refuse(c, "400 Bad Request");
                return;
            }
        } else if (!strcasecmp(line, "transfer-encoding")) {
            chunked = !strncasecmp(value, "chunked", 7);
        } else if (!strcasecmp(line, "expect")) {
            expects = !strncasecmp(value, "100-continue", 12);
        } else if (!strcasecmp(line, "connection")) {
            if (!strncasecmp(value, "close", 5)) c->closes = true;
            if (!strncasecmp(value, "keep-alive", 10)) c->closes = false;
        }
    }
    if (expects && (chunked || c->left)) {
        static const char go_on[] = "HTTP/1.1 100 Continue\r\n\r\n";
        if (send(c->fd, go_on, sizeof go_on - 1, MSG_NOSIGNAL) != sizeof go_on - 1) {
            refuse(c, "400 Bad Request");
            return;
        }
    }
    if (chunked) {
        c->left = 0;
        c->state = CHUNK_SIZE;
    } else if (c->left) {
        c->state = BODY;
    } else {
        end_request(c);
    }
}

static void chunk_size(struct connection *c, char byte)
{
    const char *const digits = "0123456789abcdef", *found = byte ? strchr(digits, byte | 32) : NULL;
    if (byte == '\n') {
        c->state = c->left ? CHUNK_DATA : TRAILER;
        c->line = 0;
    } else if (found && c->line < 12) { /* no chunk is larger than 16^12 bytes */
        c->left = c->left * 16 + (uint64_t)(found - digits);
        c->line++;
    } else if (byte != '\r') {
        refuse(c, "400 Bad Request"); /* extensions of chunks are not needed here */
    }
}

/* Read the body of a request; the number of bytes that belong to it. */
static size_t consume(struct connection *c, const char *data, size_t length)
{
    size_t at = 0;
    while (at < length && c->state != WAIT && c->state != WRITE) {
        size_t part = length - at < c->left ? length - at : (size_t)c->left;
        switch (c->state) {
        case BODY:
        case CHUNK_DATA:
            at += part;
            c->left -= part;
            if (!c->left && c->state == CHUNK_DATA)
                c->state = CHUNK_END;
            else if (!c->left)
                end_request(c);
            break;
        case CHUNK_SIZE:
            chunk_size(c, data[at++]);
            break;
        case CHUNK_END:
            if (data[at++] == '\n') c->state = CHUNK_SIZE;
            break;
        default: /* TRAILER: an empty line ends it */
            if (data[at] == '\n' && !c->line)
                end_request(c);
            else if (data[at] == '\n')
                c->line = 0;
            else if (data[at] != '\r')
                c->line++;
            at++;
        }
    }
    return at;
}

/* Send the response; false if the connection is gone. */
static bool flush(struct connection *c)
{
    while (c->sent < c->out) {
        ssize_t n = send(c->fd, c->out_bytes + c->sent, c->out - c->sent, MSG_NOSIGNAL);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
            listen_for(c, EPOLLOUT);
            c->paused = true;
            return true;
        }
        if (n < 0) {
            drop(c);
            return false;
        }
        c->sent += (size_t)n;
    }
    if (c->closes) {
        drop(c);
        return false;
    }
    c->state = HEAD;
    if (c->paused) {
        listen_for(c, EPOLLIN);
        c->paused = false;
    }
    return true;
}

/* Take as much as there is out of what the head's buffer holds: several requests, if they come at once. */
static void advance(struct connection *c)
{
    for (;;) {
        if (c->state == WRITE && (!flush(c) || c->state == WRITE)) return;
        if (c->state == WAIT || !c->head) return;
        size_t used;
        if (c->state == HEAD) {
            char *end = memmem(c->head_bytes, c->head, "\r\n\r\n", 4);
            if (!end) {
                if (c->head < HEAD_BYTES) return;
                refuse(c, "431 Request Header Fields Too Large");
                continue;
            }
            used = (size_t)(end - c->head_bytes) + 4;
            *end = 0;
            parse_head(c);
        } else {
            used = consume(c, c->head_bytes, c->head);
        }
        c->head -= used;
        memmove(c->head_bytes, c->head_bytes + used, c->head);
    }
}

static void receive(struct connection *c)
{
    ssize_t n;
    if (c->state == BODY && !c->head) { /* the kernel discards it without copying */
        n = recv(c->fd, scratch, c->left < SCRATCH_BYTES ? (size_t)c->left : SCRATCH_BYTES, MSG_TRUNC);
        if (n > 0) {
            c->left -= (uint64_t)n;
            if (!c->left) {
                end_request(c);
                advance(c);
            }
            return;
        }
    } else {
        if (c->head == HEAD_BYTES) { /* requests that came before their turn fill it: read on after the response */
            listen_for(c, 0);
            c->paused = true;
            return;
        }
        if (c->state == HEAD || c->state == WAIT || c->head) {
            n = recv(c->fd, c->head_bytes + c->head, HEAD_BYTES - c->head, 0);
            if (n > 0) {
                c->head += (size_t)n;
                advance(c);
                return;
            }
        } else {
            n = recv(c->fd, scratch, SCRATCH_BYTES, 0);
            if (n > 0) {
                size_t used = consume(c, scratch, (size_t)n), rest = (size_t)n - used;
                if (rest > HEAD_BYTES) {
                    c->closes = true; /* more than the next request's head came too soon: not what any client does */
                    rest = 0;
                }
                memcpy(c->head_bytes, scratch + used, rest);
                c->head = rest;
                advance(c);
                return;
            }
        }
    }
    if (n == 0 || (errno != EAGAIN && errno != EINTR)) drop(c);
}

static void accept_all(void)
{
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC), on = 1;
        if (fd < 0) return;
        struct connection *c = malloc(sizeof *c);
        if (!c) fail("malloc");
        memset(c, 0, offsetof(struct connection, head_bytes));
        c->fd = fd;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
        if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event) < 0) fail("epoll_ctl");
    }
}

static void answer_due(void)
{
    uint64_t now = now_ms();
    while (waiting.next != &waiting && waiting.next->due <= now) {
        struct connection *c = waiting.next;
        stop_waiting(c);
        answer(c);
        advance(c);
    }
}

static int timeout_ms(void)
{
    if (waiting.next == &waiting) return -1;
    uint64_t now = now_ms();
    return waiting.next->due > now ? (int)(waiting.next->due - now) : 0;
}

static void start(int argc, char **argv)
{
    struct rlimit files_limit;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int on = 1;
    if (argc != 4 || (strcmp(argv[2], "running") && strcmp(argv[2], "finished"))) {
        fputs("usage: stub PORT running|finished DELAY_MS\n", stderr);
        exit(2);
    }
    port = atoi(argv[1]);
    finished = !strcmp(argv[2], "finished");
    delay_ms = strtoull(argv[3], NULL, 10);
    run = (unsigned)time(NULL) ^ ((unsigned)getpid() << 16);
    signal(SIGPIPE, SIG_IGN);
    if (!getrlimit(RLIMIT_NOFILE, &files_limit)) {
        files_limit.rlim_cur = files_limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files_limit);
    }
    poller = epoll_create1(EPOLL_CLOEXEC);
    listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (poller < 0 || listener < 0) fail("start");
    address.sin_port = htons((uint16_t)port);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0) fail("bind");
    if (listen(listener, 4096) < 0) fail("listen");
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event) < 0) fail("epoll_ctl");
}

int main(int argc, char **argv)
{
    struct epoll_event events[EVENTS];
    start(argc, argv);
    for (;;) {
        int found = epoll_wait(poller, events, EVENTS, timeout_ms());
        if (found < 0 && errno != EINTR) fail("epoll_wait");
        for (int i = 0; i < found; i++) {
            struct connection *c = events[i].data.ptr;
            if (!c)
                accept_all();
            else if (c->state == WRITE)
                advance(c);
            else if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))
                receive(c);
        }
        answer_due();
    }
}
