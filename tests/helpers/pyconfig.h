/* What Python's headers must know of a machine whose Python is not here, for cross compilers: given
 * by -include, it takes the place of this machine's pyconfig.h. 64 bits; Linux or Windows. */
#define Py_PYCONFIG_H

#define SIZEOF_INT       4
#define SIZEOF_LONG_LONG 8
#define SIZEOF_SIZE_T    8
#define SIZEOF_VOID_P    8

#ifdef _WIN32
#define MS_WINDOWS
#define MS_WIN64
#define SIZEOF_LONG       4
#define SIZEOF_WCHAR_T    2
#define PY_LONG_LONG      long long /* of 3.10 */
#define Py_ENABLE_SHARED            /* Python's data is imported, */
#define HAVE_DECLSPEC_DLL           /* so its addresses are no constants */
#else
#define SIZEOF_LONG    8
#define SIZEOF_WCHAR_T 4
#define HAVE_UNISTD_H  1
#endif
