#pragma once
int launcher_main(int argc, char **argv);
int runtime_main(char **argv);
int loopback_main(void);
int exit_main(int argc, char **argv);
int pids_main(int argc, char **argv);
int criu_main(int argc, char **argv);
int tar_main(char **argv);
int log_main(int argc, char **argv);
