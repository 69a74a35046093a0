/* The whole user land of the tests' image: `server` answers HTTP, and `sh` does what a test asks for by system calls of
 * its own, so that no tool's behaviour stands between the test and the kernel. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static int said(const char *what, int result) {
    printf("%s: %s\n", what, result < 0 ? strerror(errno) : "done");
    return result < 0 ? 1 : 0;
}

static int try_connect(const char *to) {
    char host[64];
    int port = 0;
    struct sockaddr_in address = {.sin_family = AF_INET};
    if (sscanf(to, "%63s %d", host, &port) != 2) return 2;
    address.sin_port = htons(port);
    inet_pton(AF_INET, host, &address.sin_addr);
    alarm(2);
    return said("connect", connect(socket(AF_INET, SOCK_STREAM, 0), (void *)&address, sizeof address));
}

static int shell(const char *run) {
    char line[256];
    if (!strncmp(run, "write ", 6)) return said("write", open(run + 6, O_WRONLY | O_CREAT | O_TRUNC, 0644));
    if (!strcmp(run, "remount")) return said("remount", mount("none", "/", NULL, MS_REMOUNT | MS_BIND, NULL));
    if (!strcmp(run, "mount")) return said("mount", mount("tmpfs", "/run", "tmpfs", 0, NULL));
    if (!strcmp(run, "unshare")) return said("unshare", unshare(CLONE_NEWUSER));
    if (!strcmp(run, "ptrace")) return said("ptrace", ptrace(PTRACE_TRACEME, 0, 0, 0));
    if (!strcmp(run, "mknod")) return said("mknod", mknod("/run/disk", S_IFBLK | 0600, 0xfe00));
    if (!strncmp(run, "connect ", 8)) return try_connect(run + 8);
    if (!strncmp(run, "exit ", 5)) return atoi(run + 5);
    if (!strcmp(run, "status")) {
        FILE *status = fopen("/proc/self/status", "r");
        while (status && fgets(line, sizeof line, status))
            if (!strncmp(line, "Cap", 3) || !strncmp(line, "NoNewPrivs", 10) || !strncmp(line, "Seccomp:", 8)) fputs(line, stdout);
        return 0;
    }
    if (!strcmp(run, "forever")) for (;;) pause();
    fprintf(stderr, "%s: not known\n", run);
    return 127;
}

static void answer(int user) {
    char request[2048] = {0};
    char host[128] = {0};
    char text[512];
    ssize_t got = read(user, request, sizeof request - 1);
    if (got <= 0) _exit(0);
    if (!strncmp(request, "GET /exit", 9)) kill(1, SIGUSR1);
    if (!strncmp(request, "GET /slow", 9)) usleep(800 * 1000);
    gethostname(host, sizeof host - 1);
    int length = snprintf(text, sizeof text, "HTTP/1.1 200 OK\r\nContent-Length: %zu\r\nConnection: close\r\n\r\nHello from %s\n",
        strlen(host) + 12, host);
    if (write(user, text, length) < 0) _exit(1);
    shutdown(user, SHUT_WR);
    while (read(user, request, sizeof request) > 0) {}
    _exit(0);
}

static void leave(int signal) { _exit(signal == SIGUSR1 ? 7 : 0); }

int main(int count, char **words) {
    if (strstr(words[0], "sh")) return count == 3 && !strcmp(words[1], "-c") ? shell(words[2]) : 2;
    if (count > 1 && !strcmp(words[1], "fail")) { fprintf(stderr, "nothing to do\n"); return 3; }
    signal(SIGTERM, getenv("STUBBORN") ? SIG_IGN : leave);
    signal(SIGUSR1, leave);
    signal(SIGCHLD, SIG_IGN);
    int server = socket(AF_INET, SOCK_STREAM, 0), yes = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(80)};
    setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(server, (void *)&address, sizeof address) || listen(server, 512)) { perror("listen"); return 1; }
    printf("ready\n");
    fflush(stdout);
    for (;;) {
        int user = accept(server, NULL, NULL);
        if (user < 0) continue;
        if (fork() == 0) { signal(SIGUSR1, SIG_DFL); signal(SIGTERM, SIG_DFL); close(server); answer(user); }
        close(user);
    }
}
